"""The page of runs by its earlier name: `python -m evaluation.report` is `reports.report`."""

from reports.report import main, parse_args
from utils import launch

if __name__ == "__main__":
    launch(main, parse_args())
