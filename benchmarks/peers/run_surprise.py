"""scikit-surprise's SVD on a forgetting matrix, in an environment of its own.

    python run_surprise.py MATRIX.npy EPOCHS SEED OUT.npy

MATRIX.npy is (tasks + 1, examples) with NaN where unobserved; the last row is forecast into
OUT.npy. Settings as published (METHODS 5.4 b). Prints the seconds of the fit alone. It imports
nothing of unwrite, because scikit-surprise need not fit into the same environment.
"""

import sys
import time

import numpy as np
from surprise import SVD, Trainset


def main() -> None:
    """Fit, forecast, print the seconds."""
    values = np.load(sys.argv[1])
    rows, columns = values.shape
    by_row = {}
    for row in range(rows):
        seen = np.flatnonzero(~np.isnan(values[row]))
        by_row[row] = list(zip(seen.tolist(), values[row, seen].tolist(), strict=True))
    by_column = {column: [] for column in range(columns)}  # the fit does not look at these
    identity_rows, identity_columns = ({n: n for n in range(size)} for size in values.shape)
    known = int((~np.isnan(values)).sum())
    trainset = Trainset(
        by_row, by_column, rows, columns, known, (-100, 100), identity_rows, identity_columns
    )
    model = SVD(
        n_factors=5,
        n_epochs=int(sys.argv[2]),
        lr_all=0.005,
        reg_all=0.0,
        init_std_dev=0.001,
        random_state=int(sys.argv[3]),
    )
    started = time.perf_counter()
    model.fit(trainset)
    seconds = time.perf_counter() - started
    forecast = trainset.global_mean + model.bu[-1] + model.bi + model.qi @ model.pu[-1]
    np.save(sys.argv[4], forecast)
    print(seconds)


if __name__ == "__main__":
    main()
