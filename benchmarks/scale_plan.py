"""Arithmetic of memory and traffic for models of 7, 13 and 70 billion weights, on paper.

    python -m benchmarks.scale_plan

Plans by ``unwrite.plan`` from the published sizes of Llama 2 (Touvron et al., arXiv 2307.09288),
whose configurations are written here; nothing is downloaded or allocated. The GPUs have 80 GB.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import write

GPU = 80 * 10**9
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
}
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "full-ft": ("full-ft", {}),
    "full-ft, adafactor": ("full-ft", {"optimizer": "adafactor"}),
    "lora": ("lora", {}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 GPU": {},
    "8 GPUs, whole": {"processes": 8},
    "8 GPUs, sharded": {"processes": 8, "sharded": True},
    "8 GPUs, sharded, offloaded": {
        "processes": 8,
        "sharded": True,
        "offloaded": True,
        "recomputed": True,
    },
    "64 GPUs, sharded": {"processes": 64, "sharded": True, "recomputed": True},
}


def main() -> None:
    """Plan everything and write the result."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size, config in SIZES.items():
            rows += plans(size, config, Path(scratch) / size)
    write("scale_plan", {"gpu_bytes": GPU, "rows": rows})


def plans(size: str, config: dict[str, int], folder: Path) -> list[dict[str, Any]]:
    """Every method in every layout for one size."""
    from unwrite import plan
    from unwrite.footprint import Layout
    from unwrite.methods import build

    folder.mkdir()
    heads = {"num_attention_heads": config["hidden_size"] // 128, "vocab_size": 32000}
    whole = {"model_type": "llama", "tie_word_embeddings": False, **heads, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    found = []
    for method, (name, settings) in METHODS.items():
        for layout, words in LAYOUTS.items():
            # Planned for memory without end: what would fit instead is another table.
            needs = plan.for_model(
                folder, build(name, settings), layout=Layout(device="cuda", **words), memory=10**15
            )
            found.append(
                {
                    "model": size,
                    "method": method,
                    "layout": layout,
                    "parameters": needs.parameters,
                    "device_bytes": needs.memory_bytes,
                    "fits": needs.memory_bytes <= GPU,
                    "host_bytes": needs.host_bytes,
                    "disk_bytes": needs.disk_bytes,
                    "scratch_bytes": needs.scratch_bytes,
                    "traffic_bytes": needs.traffic_bytes,
                    "parts": dict(needs.parts),
                }
            )
    return found


if __name__ == "__main__":
    main()
