"""Help and mistakes are answered before anything that takes seconds to import."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# all that take a tenth of a second or more, and torch, which most of them import
HEAVY = "torch torchvision transformers timm open_clip numba matplotlib tensorboard scipy".split()
SCRIPTS = {
    "train_caption.py": ("caption", ""),
    "train_nlvr.py": ("nlvr", ""),
    "train_clip_flickr30k.py": ("retrieval", ""),
    "ComputeID.py": ("caption", ""),
    "export.py": ("caption", "--pruned run --report"),
    "prune.py": ("caption", "--sparsity 0.5 --out new"),
    "study.py": ("caption", "--id_profile ids.json"),
    "caption.py": ("caption", "tests/some.jpg"),
}
MODULES = ["reports.tables", "reports.report", "data.scenes"]
MISTAKES = {
    "train_caption.py --pruned run": "--pruned goes with --evaluate",
    "train_caption.py --spice": "--spice goes with --evaluate",
    "train_nlvr.py --config no.yaml": "cannot read the config no.yaml",
    "train_nlvr.py --config configs/nlvr_demo.yaml --useID": "names no id_profile",
    "export.py --config configs/nlvr_demo.yaml --pruned run": "nothing to do",
    "caption.py tests/some.jpg --pruned run": "--pruned goes with --config",
    "prune.py --hf x --sparsity 0.5 --nm 2:4 --out new": "give --sparsity, or --nm",
    "reports.tables tests golden": "golden holds no run",
    "reports.report tests": "tests holds no run",
}
RUN = """
import contextlib, io, json, runpy, sys
heavy, commands = json.load(sys.stdin)
answers = {}
for name, command in commands.items():
    script, *sys.argv[1:] = command.split()
    sys.argv[0] = script
    before, out, err = set(sys.modules), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if script.endswith(".py"):
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
    imported = sorted((set(sys.modules) - before) & set(heavy))
    answers[name] = code, imported, out.getvalue(), err.getvalue()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """How a script ends, its heavy imports, stdout and stderr, for each command; of one process."""
    folder = tmp_path_factory.mktemp("startup")
    flags = [f"{name} {x}" for name in (*SCRIPTS, *MODULES) for x in ("--help", "--no_such_flag")]
    commands = {command: command for command in (*MISTAKES, *flags)}
    for script, (config, flags) in SCRIPTS.items():
        text = Path(f"configs/{config}_demo.yaml").read_text()
        (folder / f"{script}.yaml").write_text(re.sub("(?m)^init_lr.*", "init_lr: fast", text))
        commands[script] = f"{script} {flags} --config {folder}/{script}.yaml"
    answers = subprocess.check_output(
        [sys.executable, "-c", RUN], input=json.dumps([HEAVY, commands]), text=True, timeout=60
    )
    return json.loads(answers)


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_help_and_wrong_flags_import_nothing_heavy(script, answers):
    code, imported, out, _ = answers[f"{script} --help"]
    assert (code, imported) == (0, []) and "usage:" in out
    code, imported, _, err = answers[f"{script} --no_such_flag"]
    assert (code, imported) == (2, []) and "usage:" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_in_the_config_imports_nothing_heavy(script, answers):
    code, imported, _, err = answers[script]
    assert (code, imported) == (2, [])
    assert f"{script}.yaml: init_lr is 'fast', but must be a number" in err


@pytest.mark.parametrize("command", MISTAKES)
def test_flags_that_do_not_fit_import_nothing_heavy(command, answers):
    code, imported, _, err = answers[command]
    assert (code, imported) == (2, [])
    assert err.startswith("error: ") and MISTAKES[command] in err
