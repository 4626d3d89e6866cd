"""The long campaign: a run is killed (`kill -9`) again and again at seeded moments of all its phases and has to end with the weights of an untouched run.

    python benchmarks/kills.py --kills 32                                    writes benchmarks/results/kills.json
    python benchmarks/kills.py --kills 8 --processes 2                       kills_two_processes.json: one of the two, the other has to end by itself
    python benchmarks/kills.py --kills 6 --phases 'the upload' --name upload     kills_upload.json: the run is pushed to a Hub on the loopback interface
    python benchmarks/kills.py --kills 20 --all-in-one                       kills_all_in_one.json: recipes/prune_distill_nf4.yaml on a tiny model

The short ones are in tests/pipeline/test_kills.py. One process has to leave the same bytes, two processes weights that differ by less than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.conftest import save_sums, save_tiny  # noqa: E402
from tests.hub.conftest import loopback_hub  # noqa: E402
from tests.hub.fake_hub import FakeHub  # noqa: E402
from tests.pipeline.kills import (  # noqa: E402
    ALL_IN_ONE,
    PHASES,
    PHASES_OF_ALL,
    RECIPE,
    UPLOAD,
    campaign,
    campaign_of_two,
    command,
    environment,
    launch,
    small,
)

TOLERANCE = 1e-5
SECONDS_OF_A_REQUEST = 0.1  # so that an upload to this machine lasts for about a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--all-in-one", action="store_true", help="the recipe that prunes, distils, quantizes and corrects, in one process")
    parser.add_argument("--phases", help="separated by semicolons; all but the upload unless said otherwise")
    parser.add_argument("--name", default="", help="of the file of results")
    args = parser.parse_args()
    if args.all_in_one and args.processes == 2:
        parser.error("--all-in-one is for one process")
    signs = PHASES_OF_ALL if args.all_in_one else PHASES | UPLOAD
    phases = args.phases.split(";") if args.phases else [phase for phase in signs if phase not in UPLOAD]
    name = args.name or ("all_in_one" if args.all_in_one else "two_processes" if args.processes == 2 else "")
    rng = random.Random(args.seed)
    hit: Counter[str] = Counter()
    missed = runs = done = 0
    difference = slowest = 0.0
    os.environ["ACCELERATE_USE_CPU"] = "1"
    with tempfile.TemporaryDirectory() as folder, hub_for(phases, Path(folder)) as hub:
        place = Path(folder)
        recipe, options = write_recipe(place)
        if args.all_in_one:
            recipe, options = ALL_IN_ONE, small(place / "model", place / "pairs.jsonl")
        whole = launch(recipe, place / "whole") if args.processes == 2 else [*command(recipe, place / "whole"), *options]
        subprocess.run(whole, env=environment(), check=True, capture_output=True)
        while sum(hit.values()) < args.kills:
            # a run is killed several times, in the order of its phases, some of them twice
            drawn = sorted(rng.choices(phases, k=min(rng.randint(3, 6), args.kills)), key=[*signs].index)
            out, seed = place / f"killed-{done}", rng.randrange(10**6)
            if args.processes == 2:
                found = campaign_of_two(recipe, out, drawn, seed=seed)
            else:
                to_hub = ["--push_to_hub", "true", "--hub_model_id", f"me/{out.name}"] if hub else []
                found = campaign(recipe, out, drawn, seed=seed, options=[*options, *to_hub], signs=signs)
            difference = max(difference, largest_difference(place / "whole", out, exact=args.processes == 1))
            if hub:
                require_uploaded(hub, out)
            hit.update(phase for phase, _ in found.kills)
            missed, runs, done, slowest = missed + found.missed, runs + found.runs, done + 1, max(slowest, found.slowest_end)
            print(f"{sum(hit.values())} kills, {done} runs brought to their end", flush=True)
            result: dict[str, Any] = {
                "kills": sum(hit.values()),
                "by_phase": dict(hit),
                "ended_before_the_kill": missed,
                "processes" if args.processes == 1 else "launches": runs,
                "recipes_finished": done,
            }
            result |= (
                {"different_bytes": 0} if args.processes == 1 else {"largest_difference": difference, "seconds_until_a_launch_ended_at_most": round(slowest, 1)}
            )
            file = HERE / "results" / f"kills{'_' if name else ''}{name}.json"
            file.write_text(json.dumps({**result, "seed": args.seed}, indent=2) + "\n", encoding="utf-8")


def write_recipe(place: Path) -> tuple[Path, list[str]]:
    """A recipe in a folder, with its model and its rows; and its flags, of which it needs none."""
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=save_tiny(place / "model", intermediate_size=256), rows=save_sums(place / "pairs.jsonl", 60)))
    return recipe, []


@contextmanager
def hub_for(phases: list[str], place: Path) -> Iterator[FakeHub | None]:
    """A slow Hub on the loopback interface, where one of the phases is the upload."""
    if not UPLOAD.keys() & set(phases):
        yield None
        return
    with loopback_hub(place / "cache") as hub:
        os.environ["HF_HUB_OFFLINE"] = "0"
        handler: Any = hub.server.RequestHandlerClass
        answer = handler._handle

        def slow(self: Any) -> None:
            time.sleep(SECONDS_OF_A_REQUEST)
            answer(self)

        handler._handle = slow
        hub.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a killed run says no goodbye
        yield hub


def largest_difference(whole: Path, killed: Path, exact: bool) -> float:
    """Between the weights of an untouched run and one that was killed. 4-bit codes have to be equal.

    Raises:
        AssertionError: it is not what was promised.
    """
    largest, weights = 0.0, sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors") if "00-base" not in file.parts)
    assert len(weights) >= 3
    for name in weights:
        if exact:
            assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
            continue
        one, other = load_file(whole / name), load_file(killed / name)
        assert one.keys() == other.keys()
        for key in one:
            difference = float((one[key].double() - other[key].double()).abs().max())
            assert difference < TOLERANCE, (name, key, difference)
            largest = max(largest, difference)
    return largest


def require_uploaded(hub: FakeHub, out: Path) -> None:
    """Want the repository to hold the weights of the folder, in one commit besides the one that made it."""
    repo = f"me/{out.name}"
    assert hub.files(repo)["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert len(hub.repos[repo].commits) <= 2


if __name__ == "__main__":
    main()
