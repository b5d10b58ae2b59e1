"""The launch files of the examples mean to accelerate what their comments say."""

from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
FILES = {
    "one-machine.yaml": {"processes": 8, "machines": 1, "fsdp": False},
    "sharded.yaml": {"processes": 8, "machines": 1, "fsdp": True},
    "sharded-offloaded.yaml": {"processes": 8, "machines": 1, "fsdp": True, "offload": True},
    "eight-machines.yaml": {"processes": 64, "machines": 8, "fsdp": True},
}


def test_every_file_is_tested():
    assert {file.name for file in LAUNCH.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name, monkeypatch):
    """The way ``accelerate launch`` does, up to the environment that a process would get."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    wanted = FILES[name]
    words = ["--config_file", str(LAUNCH / name), "--module", "unwrite", "history", "home"]
    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(given)
    assert given.training_script == "unwrite" and given.module
    assert (given.num_processes, given.num_machines) == (wanted["processes"], wanted["machines"])
    assert given.use_fsdp == wanted["fsdp"]
    if not wanted["fsdp"]:
        assert given.multi_gpu and "ACCELERATE_USE_FSDP" not in environment
        return
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert (environment["FSDP_OFFLOAD_PARAMS"] == "true") == wanted.get("offload", False)
    for key in environment:
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, environment[key])
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing == (name != "sharded.yaml")
