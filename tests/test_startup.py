"""Help and mistakes are answered before anything that takes seconds to import."""

import json
import re
import subprocess
import sys
from pathlib import Path

# all that take a tenth of a second or more, and torch, which most of them import
HEAVY = "torch torchvision transformers timm open_clip numba matplotlib tensorboard scipy".split()
# scripts that read a config: its task, and flags
SCRIPTS = {
    "train_caption.py": ("caption", ""),
    "train_nlvr.py": ("nlvr", ""),
    "train_clip_flickr30k.py": ("retrieval", ""),
    "ComputeID.py": ("caption", ""),
    "export.py": ("caption", "--pruned run --report"),
    "study.py": ("caption", "--id_profile ids.json"),
    "caption.py": ("caption", "tests/some.jpg"),
}
ALL = [*SCRIPTS, "reports.tables", "reports.report", "data.scenes"]
MISTAKES = {
    "train_caption.py --pruned run": "--pruned goes with --evaluate",
    "train_nlvr.py --config no.yaml": "cannot read the config no.yaml",
    "train_nlvr.py --config configs/nlvr_demo.yaml --useID": "names no id_profile",
    "export.py --config configs/nlvr_demo.yaml --pruned run": "nothing to do",
    "caption.py tests/some.jpg --pruned run": "--pruned goes with --config",
    "reports.tables tests golden": "golden holds no run",
    "reports.report tests": "tests holds no run",
}
RUN = """
import contextlib, io, json, runpy, sys
heavy, commands = json.load(sys.stdin)
answers = {}
for command in commands:
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
    answers[command] = code, imported, out.getvalue() + err.getvalue()
print(json.dumps(answers))
"""


def test_help_and_mistakes_import_nothing_heavy(tmp_path):
    expected = {f"{name} --help": (0, "usage:") for name in ALL}
    expected |= {f"{name} --no_such_flag": (2, "usage:") for name in ALL}
    expected |= {command: (2, f"error: .*{said}") for command, said in MISTAKES.items()}
    for script, (task, flags) in SCRIPTS.items():
        config, text = f"{tmp_path}/{script}.yaml", Path(f"configs/{task}_demo.yaml").read_text()
        Path(config).write_text(re.sub("(?m)^init_lr.*", "init_lr: fast", text))
        expected[f"{script} {flags} --config {config}"] = (2, f"error: {config}: init_lr is 'fast'")
    answers = subprocess.check_output(
        [sys.executable, "-c", RUN], input=json.dumps([HEAVY, [*expected]]), text=True, timeout=60
    )
    for command, (code, imported, printed) in json.loads(answers).items():
        assert (code, imported) == (expected[command][0], []), command
        assert re.search(expected[command][1], printed), command
