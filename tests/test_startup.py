"""Help and mistakes are answered before anything that takes seconds to import."""

import json
import subprocess
import sys

import pytest

# all that take a tenth of a second or more, and torch, which most of them import
HEAVY = "torch torchvision transformers timm open_clip numba matplotlib tensorboard scipy".split()
SCRIPTS = {
    "train_caption.py": ["--config", "{config}"],
    "train_nlvr.py": ["--config", "{config}"],
    "train_clip_flickr30k.py": ["--config", "{config}"],
    "ComputeID.py": ["--config", "{config}"],
    "export.py": ["--config", "{config}", "--pruned", "run", "--report"],
    "study.py": ["--config", "{config}", "--id_profile", "ids.json"],
    "caption.py": ["tests/some.jpg", "--config", "{config}"],
}
MODULES = ["reports.tables", "reports.report", "data.scenes"]
RUN = """
import json, runpy, sys
heavy, script, *sys.argv[1:] = json.loads(sys.argv[1])
sys.argv[0] = script
try:
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    print("ended", stop.code, sorted(sys.modules.keys() & set(heavy)))
"""


def run(script, *flags) -> tuple[str, str]:
    """How a script ended and which heavy packages it had imported by then; and what it said."""
    command = [sys.executable, "-c", RUN, json.dumps([HEAVY, script, *flags])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[-1], done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "reports.tables", "reports.report", "data.scenes"])
def test_help_and_wrong_flags_import_nothing_heavy(script):
    assert run(script, "--help") == ("ended 0 []", "")
    ended, said = run(script, "--no_such_flag")
    assert ended == "ended 2 []" and "usage:" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_in_the_config_imports_nothing_heavy(script, tmp_path):
    config = tmp_path / "config.yaml"
    name = {"train_nlvr.py": "nlvr", "train_clip_flickr30k.py": "retrieval"}.get(script, "caption")
    with open(f"configs/{name}_demo.yaml") as file:
        lines = [line for line in file if not line.startswith("init_lr")]
    config.write_text("".join(lines) + "init_lr: fast\n")
    ended, said = run(script, *[flag.format(config=config) for flag in SCRIPTS[script]])
    assert ended == "ended 2 []"
    assert said.startswith(f"error: {config}: init_lr is 'fast', but must be a number")


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("train_caption.py", "--pruned run", "--pruned goes with --evaluate"),
        ("train_caption.py", "--spice", "--spice and --samples go with --evaluate"),
        ("train_nlvr.py", "--config no.yaml", "cannot read the config no.yaml"),
        ("train_nlvr.py", "--config configs/nlvr_demo.yaml --useID", "names no id_profile"),
        ("export.py", "--config configs/nlvr_demo.yaml --pruned run", "nothing to do"),
        ("caption.py", "tests/some.jpg --pruned run", "--pruned goes with --config"),
        ("reports.tables", "tests golden", "golden holds no run"),
        ("reports.report", "tests", "tests holds no run"),
    ],
)
def test_flags_that_do_not_fit_import_nothing_heavy(script, flags, said):
    ended, error = run(script, *flags.split())
    assert ended == "ended 2 []"
    assert error.startswith("error: ") and said in error
