"""The long campaign: a run is killed (`kill -9`) again and again at seeded moments of all its phases and has to end with the bytes of an untouched run.

    python benchmarks/kills.py --kills 32

Writes benchmarks/results/kills.json. The short one is tests/pipeline/test_kills.py.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.conftest import save_tiny  # noqa: E402
from tests.pipeline.kills import PHASES, RECIPE, campaign, command, environment  # noqa: E402

SAME = ("steps/01-prune.ffn/model.safetensors", "steps/02-distill.whitebox/model.safetensors", "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    hit: Counter[str] = Counter()
    missed = runs = done = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = place / "pairs.jsonl"
        rows.write_text(
            "".join(json.dumps({"prompt": f"What is {n} plus {n + 1}?", "completion": f"{n} plus {n + 1} is {2 * n + 1}."}) + "\n" for n in range(60))
        )
        recipe = place / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=save_tiny(place / "model", intermediate_size=256), rows=rows))
        subprocess.run(command(recipe, place / "whole"), env=environment(), check=True, capture_output=True)
        while sum(hit.values()) < args.kills:
            # a run is killed several times, in the order of its phases, some of them twice
            phases = sorted(rng.choices(list(PHASES), k=rng.randint(3, 6)), key=list(PHASES).index)
            found = campaign(recipe, place / f"killed-{done}", phases, seed=rng.randrange(10**6))
            for name in SAME:
                assert (place / f"killed-{done}" / name).read_bytes() == (place / "whole" / name).read_bytes(), (name, found)
            hit.update(phase for phase, _ in found.kills)
            missed, runs, done = missed + found.missed, runs + found.runs, done + 1
            print(f"{sum(hit.values())} kills, {done} runs brought to their end, the bytes are the same", flush=True)
            result = {"kills": sum(hit.values()), "by_phase": dict(hit), "ended_before_the_kill": missed, "processes": runs, "recipes_finished": done}
            (HERE / "results" / "kills.json").write_text(json.dumps({**result, "different_bytes": 0, "seed": args.seed}, indent=2) + "\n")


if __name__ == "__main__":
    main()
