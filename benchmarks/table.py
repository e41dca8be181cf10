"""The figures of JSON files that the benchmarks wrote, as Markdown tables.

python -m benchmarks.table FILE [FILE ...]
"""

import json
import sys
from pathlib import Path

from benchmarks.harness import Figure


def main() -> None:
    """One table a file."""
    for name in sys.argv[1:]:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        print(f"**{content['title']}** ({Path(name).stem}.json)\n")
        print("| case | median | least to most | |\n|---|---|---|---|")
        for figure in content["figures"]:
            print(f"| {' | '.join(Figure(**figure).cells)} |")
        print()


if __name__ == "__main__":
    main()
