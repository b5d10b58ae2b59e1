"""Imports flow one way: every module may import only modules of lower layers (DESIGN 2.3).

Read from the source text, so that an import hidden inside a function counts as well.
"""

import ast
from pathlib import Path

import pytest

import unwrite

PACKAGE = Path(unwrite.__file__).parent

# One set a layer, lowest first. Inside a layer, the arrows listed in SIDEWAYS are allowed.
LAYERS = [
    {
        "allocator",
        "errors",
        "executors",
        "files",
        "progress",
        "scratch",
        "formats",
        "edits",
        "hub",
        "logbook",
        "prompts",
        "subjects",
        "data",
        "tasks",
        "task_bank",
        "task_forms",
        "task_words",
        "forgetting.examples",
    },
    {
        "forgetting.matrix",
        "forgetting.completion",
        "forgetting.factorization",
        "forgetting.neighbours",
        "forgetting.published",
        "forgetting.logistic",
        "forgetting.design",
        "forgetting.protocol",
        "forgetting.replay",
        "forgetting.fitting",
        "forgetting.similarity",
        "products",
        "tensorfile",
        "weights",
        "change",
        "deltafile",
        "delta",
        "ledger",
        "scores",
        "neighbour_metrics",
        "requirements",
        "selection",
        "where",
    },
    {
        "forgetting.measurement",
        "forgetting.collection",
        "forgetting.online",
        "anatomy",
        "pretrained",
        "model",
        "neighbours",
        "kept",
        "own_text",
        "optimizers",
        "halves",
        "processes",
        "sharding",
        "adapters",
        "training",
        "observe",
        "activations",
        "moments",
        "wordings",
        "values",
        "refining",
        "self_check",
        "trace",
        "forgetting.per_example",
        "forgetting.fisher",
        "forgetting.confidence",
        "forgetting.self_generation",
        "forgetting.features",
    },
    {
        "forgetting.graceful",
        "forgetting.penalty",
        "methods",
        "methods.probes",
        "methods.full_ft",
        "methods.lora",
        "methods.constrained_ft",
        "methods.auto",
        "methods.f_learning",
        "methods.delicate",
        "methods.rome",
        "methods.memit",
        "methods.alpha_edit",
        "methods.loc_ft",
    },
    {
        "base",
        "card",
        "compaction",
        "present",
        "record",
        "reproduction",
        "export",
        "footprint",
        "home",
        "protection",
        "plan",
        "testing",
        "measuring",
        "reference",
        "grid",
        "ability",
        "bench",
        "reload",
        "robustness",
        "start",
        "cell",
        "bootstrap",
        "columns",
        "tables",
        "page",
        "tracking",
        "knowledge",
        "heatmap",
        "plots",
        "trace_picture",
        "run_report",
        "matrix_report",
        "comparison",
        "finetuning",
    },
    {
        "api",
        "console",
        "home_report",
        "reporting",
        "verb",
        "forgetting",
        "cli_finetune",
        "cli_forgetting",
    },
    {"session", "serve"},
    {"cli", "demo", "__main__", "__init__"},
]
SIDEWAYS = {
    ("executors", "errors"),
    ("files", "errors"),
    ("progress", "files"),
    ("forgetting.examples", "edits"),
    ("forgetting.examples", "errors"),
    ("forgetting.examples", "files"),
    ("forgetting.examples", "formats"),
    ("forgetting.completion", "forgetting.matrix"),
    ("forgetting.factorization", "forgetting.completion"),
    ("forgetting.factorization", "forgetting.matrix"),
    ("forgetting.neighbours", "forgetting.completion"),
    ("forgetting.neighbours", "forgetting.matrix"),
    ("forgetting.published", "forgetting.completion"),
    ("forgetting.published", "forgetting.matrix"),
    ("forgetting.published", "forgetting.neighbours"),
    ("forgetting.logistic", "forgetting.completion"),
    ("forgetting.logistic", "forgetting.matrix"),
    ("forgetting.design", "forgetting.factorization"),
    ("forgetting.protocol", "forgetting.completion"),
    ("forgetting.protocol", "forgetting.design"),
    ("forgetting.protocol", "forgetting.factorization"),
    ("forgetting.protocol", "forgetting.matrix"),
    ("forgetting.replay", "forgetting.matrix"),
    ("forgetting.measurement", "model"),
    ("forgetting.fitting", "forgetting.completion"),
    ("forgetting.fitting", "forgetting.factorization"),
    ("forgetting.fitting", "forgetting.logistic"),
    ("forgetting.fitting", "forgetting.matrix"),
    ("forgetting.fitting", "forgetting.neighbours"),
    ("forgetting.fitting", "forgetting.protocol"),
    ("forgetting.similarity", "forgetting.completion"),
    ("forgetting.similarity", "forgetting.matrix"),
    ("forgetting.features", "forgetting.per_example"),
    ("forgetting.features", "model"),
    ("forgetting.features", "training"),
    ("forgetting.collection", "forgetting.measurement"),
    ("forgetting.collection", "model"),
    ("forgetting.collection", "pretrained"),
    ("forgetting.collection", "training"),
    ("forgetting.online", "forgetting.measurement"),
    ("forgetting.online", "model"),
    ("formats", "errors"),
    ("formats", "files"),
    ("edits", "errors"),
    ("edits", "files"),
    ("edits", "formats"),
    ("edits", "hub"),
    ("hub", "errors"),
    ("logbook", "errors"),
    ("hub", "formats"),
    ("edits", "data"),
    ("prompts", "errors"),
    ("tasks", "errors"),
    ("tasks", "files"),
    ("tasks", "formats"),
    ("tasks", "hub"),
    ("tasks", "task_bank"),
    ("tasks", "task_forms"),
    ("task_forms", "errors"),
    ("task_forms", "formats"),
    ("task_bank", "edits"),
    ("task_bank", "task_words"),
    ("prompts", "formats"),
    ("weights", "tensorfile"),
    ("delta", "weights"),
    ("delta", "change"),
    ("delta", "tensorfile"),
    ("delta", "deltafile"),
    ("deltafile", "change"),
    ("deltafile", "tensorfile"),
    ("deltafile", "weights"),
    ("change", "tensorfile"),
    ("neighbour_metrics", "scores"),
    ("requirements", "scores"),
    ("selection", "change"),
    ("selection", "delta"),
    ("selection", "tensorfile"),
    ("model", "anatomy"),
    ("model", "pretrained"),
    ("adapters", "model"),
    ("processes", "model"),
    ("processes", "pretrained"),
    ("sharding", "anatomy"),
    ("sharding", "model"),
    ("sharding", "processes"),
    ("training", "neighbours"),
    ("training", "kept"),
    ("kept", "model"),
    ("training", "own_text"),
    ("own_text", "model"),
    ("moments", "own_text"),
    ("training", "optimizers"),
    ("training", "halves"),
    ("self_check", "kept"),
    ("self_check", "model"),
    ("self_check", "neighbours"),
    ("self_check", "observe"),
    ("self_check", "training"),
    ("self_check", "wordings"),
    ("halves", "optimizers"),
    ("training", "processes"),
    ("training", "sharding"),
    ("training", "adapters"),
    ("training", "model"),
    ("observe", "model"),
    ("activations", "model"),
    ("trace_picture", "page"),
    ("trace_picture", "plots"),
    ("moments", "activations"),
    ("moments", "model"),
    ("moments", "pretrained"),
    ("moments", "training"),
    ("refining", "activations"),
    ("refining", "kept"),
    ("refining", "model"),
    ("refining", "training"),
    ("refining", "values"),
    ("values", "activations"),
    ("values", "model"),
    ("values", "training"),
    ("values", "wordings"),
    ("wordings", "activations"),
    ("forgetting.per_example", "model"),
    ("forgetting.fisher", "forgetting.per_example"),
    ("forgetting.fisher", "model"),
    ("forgetting.fisher", "training"),
    ("forgetting.confidence", "anatomy"),
    ("forgetting.confidence", "forgetting.per_example"),
    ("forgetting.confidence", "model"),
    ("forgetting.confidence", "training"),
    ("forgetting.self_generation", "model"),
    ("forgetting.self_generation", "pretrained"),
    ("forgetting.self_generation", "training"),
    ("trace", "activations"),
    ("trace", "model"),
    ("trace", "moments"),
    ("trace", "pretrained"),
    ("methods.alpha_edit", "methods.memit"),
    ("methods", "methods.full_ft"),
    ("methods.probes", "methods"),
    ("methods.auto", "methods.full_ft"),
    ("methods.auto", "methods.memit"),
    ("methods.f_learning", "methods.full_ft"),
    ("methods.f_learning", "methods.probes"),
    ("methods.delicate", "methods.full_ft"),
    ("methods.delicate", "methods.probes"),
    ("home", "measuring"),
    ("home", "base"),
    ("home", "compaction"),
    ("home", "present"),
    ("present", "base"),
    ("compaction", "base"),
    ("home", "export"),
    ("home", "record"),
    ("home", "reproduction"),
    ("home", "protection"),
    ("export", "base"),
    ("export", "card"),
    ("card", "base"),
    ("plan", "footprint"),
    ("bench", "ability"),
    ("bench", "base"),
    ("bench", "grid"),
    ("start", "bench"),
    ("robustness", "bench"),
    ("robustness", "export"),
    ("robustness", "reload"),
    ("comparison", "protection"),
    ("cell", "ability"),
    ("cell", "bench"),
    ("cell", "grid"),
    ("cell", "measuring"),
    ("cell", "record"),
    ("cell", "reference"),
    ("cell", "robustness"),
    ("cell", "start"),
    ("tables", "bootstrap"),
    ("columns", "bootstrap"),
    ("columns", "robustness"),
    ("tables", "columns"),
    ("tables", "grid"),
    ("tables", "reference"),
    ("knowledge", "page"),
    ("matrix_report", "page"),
    ("matrix_report", "plots"),
    ("run_report", "grid"),
    ("run_report", "heatmap"),
    ("run_report", "knowledge"),
    ("run_report", "page"),
    ("run_report", "plots"),
    ("comparison", "ability"),
    ("comparison", "base"),
    ("comparison", "bench"),
    ("comparison", "cell"),
    ("comparison", "grid"),
    ("comparison", "home"),
    ("comparison", "reference"),
    ("comparison", "robustness"),
    ("comparison", "run_report"),
    ("comparison", "start"),
    ("comparison", "tables"),
    ("reporting", "home_report"),
    ("cli_finetune", "console"),
    ("verb", "console"),
    ("cli_forgetting", "api"),
    ("cli_forgetting", "console"),
    ("cli_forgetting", "verb"),
    ("serve", "session"),
    ("cli_finetune", "verb"),
    ("demo", "__init__"),
    ("__main__", "cli"),
}
HEAVY = {"transformers", "peft", "accelerate"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "__init__"
        found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(imported: str, known: set[str]) -> str | None:
    """The module of ours that an imported dotted name belongs to."""
    if imported != "unwrite" and not imported.startswith("unwrite."):
        return None
    name = imported.removeprefix("unwrite").lstrip(".")
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return "__init__"


def layer_of(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer():
    placed = set().union(*LAYERS)
    assert set(modules()) <= placed, "place the new module in LAYERS"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_flow_down(module):
    known = modules()
    if module == "__init__":
        pytest.skip("the public list names everything, lazily")
    for imported in imports(known[module]):
        target = own(imported, set(known))
        if target is None or target == module:
            continue
        below = layer_of(target) < layer_of(module)
        assert below or (module, target) in SIDEWAYS, f"{module} must not import {target}"


@pytest.mark.parametrize("module", sorted(LAYERS[0] | LAYERS[1]))
def test_the_tensor_layer_works_without_transformers(module):
    if module not in modules():
        pytest.skip("a folder of data")
    names = {name.partition(".")[0] for name in imports(modules()[module])}
    assert not names & HEAVY


def test_nothing_reads_pickles():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "import pickle" not in text
        assert "torch.load(" not in text, path
