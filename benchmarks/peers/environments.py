"""Make one virtual environment for each peer, with a CPU build of torch where pip has one at hand: python benchmarks/peers/environments.py FOLDER [NAME ...]"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
PEERS = {
    "llmcompressor": ["llmcompressor==0.14.0.1", "transformers==5.17.0", "accelerate==1.15.0"],
    "misc": ["hqq==0.2.8.post1", "optimum-quanto==0.2.7", "torchao==0.18.0", "torch-pruning==1.6.1", "transformers==5.23.0", "accelerate==1.15.0"],
    "autoround": ["auto-round==0.16.1", "transformers==5.23.0", "accelerate==1.15.0"],
    "trl": ["trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0"],
}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    root, names = Path(sys.argv[1]), sys.argv[2:] or list(PEERS)
    for name in names:
        folder = root / name
        if (folder / "ready").exists():
            continue
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        for packages in ([TORCH], PEERS[name]):
            subprocess.run([*pip, *packages], check=True)
        (folder / "ready").touch()
        print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
