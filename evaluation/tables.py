"""The table of runs by its earlier name: `python -m evaluation.tables` is `reports.tables`."""

from reports.tables import main, parse_args
from utils import launch

if __name__ == "__main__":
    launch(main, parse_args())
