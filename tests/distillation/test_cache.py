"""The teacher's cache: what it holds is what the teacher said; complete or absent; used again; never used for other rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.context import Run
from llmlite.distillation import cache as cache_module
from llmlite.distillation.cache import TeacherCache, choose_kind
from llmlite.distillation.objective import Distillation, HiddenTeacher
from llmlite.distillation.teacher import LiveTeacher, TeacherModel
from llmlite.errors import RunError
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import IGNORE_INDEX, next_token_labels
from tests.conftest import save_tiny


@pytest.fixture(autouse=True)
def _small_shards(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_ROWS_PER_SHARD", 4)


def context(model: Path, data: Path, **options: Any) -> Run:
    settings = llmlite.Data(train=str(data), max_length=64, evaluation_rows=6, **options)
    return Run(llmlite.Recipe(model=str(model), data=settings, steps=[llmlite.DistillWhiteBox()]))


def cache_of(run: Run, kind: Any, k: int = 8, temperature: float = 1.0, **teacher: Any) -> TeacherCache:
    data = run.train_data
    return TeacherCache(TeacherModel(run, **teacher), data, kind, k, temperature, data.fingerprint())


def batch_of(run: Run, rows: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    data = run.train_data
    batch = data.collator()([data.dataset[row] for row in rows])
    labels_N = next_token_labels(batch.pop("labels")).reshape(-1)
    return {**batch, "rows": torch.tensor(rows)}, labels_N


def loss_and_gradient(signal: Any, labels_N: torch.Tensor, width: int, vocabulary: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(len(labels_N), width, generator=generator).requires_grad_()
    head_VD = torch.randn(vocabulary, width, generator=generator)
    loss = chunked_head_loss(hidden_ND, head_VD, Distillation(signal, labels_N, temperature=temperature), keep_N=labels_N != IGNORE_INDEX).loss
    return loss.detach(), torch.autograd.grad(loss, hidden_ND)[0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("kind", "k", "allowed"), [("hidden", 0, 2e-2), ("top_k", 320, 2e-3), ("top_k", 300, 5e-2)])
def test_a_cached_teacher_teaches_what_the_live_one_does(model_folder, pairs_file, kind, k, allowed, packing):
    run = context(model_folder, pairs_file, packing=packing)
    cache = cache_of(run, kind, k, temperature=2.0)
    live = LiveTeacher(cache.teacher.load())
    cache.fill(run, lambda: live, 3)
    rows = [5, 0, 7] if packing else [17, 3, 30, 4]
    inputs, labels_N = batch_of(run, rows)
    ours, theirs = (loss_and_gradient(teacher.signal(inputs, labels_N), labels_N, 16, 320, 2.0) for teacher in (cache.read(run.device), live))
    torch.testing.assert_close(ours[0], theirs[0], rtol=allowed, atol=1e-3)
    assert (ours[1] - theirs[1]).norm() < allowed * theirs[1].norm()


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_a_product_in_bfloat16_teaches_nearly_what_one_in_float32_does(model_folder, pairs_file, tmp_path, monkeypatch, share):
    """The head of a published model is in bfloat16: nothing is lost by its type, only by the product's, and not for the ids that are kept."""
    published = tmp_path / "published"
    shutil.copytree(model_folder, published)
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(published)
    monkeypatch.setattr(cache_module, "_LIKELIEST", round(share * 320))
    run = context(published, pairs_file)
    cache = cache_of(run, "hidden")
    cache.fill(run, lambda: LiveTeacher(cache.teacher.load()), 3)
    inputs, labels_N = batch_of(run, [5, 0, 7])
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(cache_module, "quick_dtype", lambda device, own, dtype=dtype: dtype)
        teacher = cache.read(run.device)
        assert teacher.head.weight_VD.dtype == dtype
        found[dtype] = loss_and_gradient(teacher.signal(inputs, labels_N), labels_N, 16, 320)[1]
    error = float((found[torch.bfloat16] - found[torch.float32]).norm() / found[torch.float32].norm())
    assert error < 1e-6 if share == 1.0 else 0 < error < 2e-3


def test_logits_of_all_batches_are_written_to_the_same_memory(model_folder, pairs_file):
    run = context(model_folder, pairs_file)
    cache = cache_of(run, "hidden")
    cache.fill(run, lambda: LiveTeacher(cache.teacher.load()), 3)
    teacher = cache.read(run.device)
    places = set()
    for rows in ([5], [0, 7], [3]):
        inputs, labels_N = batch_of(run, rows)
        places.add(teacher.signal(inputs, labels_N).signal((labels_N != IGNORE_INDEX).nonzero().flatten(), run.device)[0].data_ptr())
    assert len(places) == 1


def test_a_stopped_cache_continues_with_what_is_missing_and_a_complete_one_needs_no_teacher(model_folder, pairs_file):
    run = context(model_folder, pairs_file)
    cache = cache_of(run, "hidden")
    teacher = LiveTeacher(cache.teacher.load())
    cache.fill(run, lambda: teacher, 2)
    assert cache.shards > 2
    whole = {path.name: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    shutil.rmtree(cache.folder / "0001")
    damaged = cache.folder / "0002" / "signals.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert cache.missing() == ["0001", "0002"]

    called = []
    cache.fill(run, lambda: called.append(1) or teacher, 2)
    assert called == [1]
    now = {path.name: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    assert {name for name in whole if now[name] != whole[name]} == {"0001", "0002"}
    cache.fill(run, lambda: pytest.fail("the teacher was loaded"), 2)


def test_entries_and_only_they_take_the_bytes_that_were_promised(model_folder, pairs_file):
    run = context(model_folder, pairs_file)
    for kind in ("hidden", "top_k"):
        cache = cache_of(run, kind)
        cache.fill(run, lambda cache=cache: LiveTeacher(cache.teacher.load()), 2)
        teacher = cache.read(run.device)
        entries = sum(int(shard["counts"].sum()) for shard in teacher.shards)
        stored = sum(t.numel() * t.element_size() for shard in teacher.shards for name, t in shard.items() if name != "counts")
        assert stored == entries * cache.bytes_per_token
        assert entries == run.train_data.counts.trained_tokens


def test_the_place_changes_with_teacher_text_precision_and_temperature(model_folder, pairs_file, tmp_path):
    run = context(model_folder, pairs_file)
    other = save_tiny(tmp_path / "other", hidden_size=32)
    fewer = context(model_folder, pairs_file, max_train_rows=20)
    top_k = cache_of(run, "top_k")
    places = [
        cache_of(run, "hidden"),
        top_k,
        cache_of(run, "top_k", k=9),
        cache_of(run, "top_k", temperature=2.0),
        cache_of(run, "hidden", name=str(other)),
        cache_of(run, "hidden", dtype="bfloat16"),
        cache_of(run, "hidden", quantization="int8"),
        cache_of(fewer, "hidden"),
    ]
    assert len({cache.folder for cache in places}) == len(places)
    assert cache_of(run, "hidden", temperature=2.0).folder == places[0].folder  # a hidden state has no temperature


def test_the_place_changes_with_the_teachers_config(model_folder, pairs_file, tmp_path):
    """The same weights with other positions, or with a softcap, say something else."""
    teacher = tmp_path / "teacher"
    shutil.copytree(model_folder, teacher)
    places = [cache_of(context(model_folder, pairs_file), kind, name=str(teacher)).folder for kind in ("hidden", "top_k")]
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    places += [cache_of(context(model_folder, pairs_file), kind, name=str(teacher)).folder for kind in ("hidden", "top_k")]
    assert len(set(places)) == 4


def test_rows_that_are_not_the_caches_are_refused(model_folder, pairs_file):
    run = context(model_folder, pairs_file)
    cache = cache_of(run, "hidden")
    cache.fill(run, lambda: LiveTeacher(cache.teacher.load()), 2)
    inputs, labels_N = batch_of(run, [0, 1])
    labels_N[labels_N != IGNORE_INDEX] = labels_N[labels_N != IGNORE_INDEX].index_fill(0, torch.tensor([0]), IGNORE_INDEX)
    with pytest.raises(RunError, match="belongs to other rows"):
        cache.read(run.device).signal(inputs, labels_N)


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1])
def test_ids_of_every_size_come_back(vocabulary):
    ids = torch.tensor([[0, 1, 2**15 - 1, 2**15, 2**16 - 1, vocabulary - 1]])
    stored = cache_module._as_stored(ids, vocabulary)
    assert stored.element_size() == (2 if vocabulary <= 2**16 else 4)
    assert torch.equal(cache_module._widened(stored), ids)


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1])
def test_a_batch_of_which_no_token_is_trained_joins_the_others_of_its_shard(model_folder, pairs_file, monkeypatch, vocabulary):
    cache = cache_of(context(model_folder, pairs_file), "top_k")
    monkeypatch.setattr(cache.teacher.config, "vocab_size", vocabulary)
    signal = HiddenTeacher(torch.randn(5, 3), torch.randn(vocabulary, 3))
    none, some = (cache._entries(signal, torch.tensor(rows, dtype=torch.int64), cache_module._Rough()) for rows in ([], [4, 1]))
    for name, part in some.items():
        assert torch.equal(torch.cat([none[name], part]), part)


def test_auto_takes_what_is_there_then_what_fits_then_the_live_teacher():
    sizes: Any = {"hidden": 100, "top_k": 20}

    def choose(**changes: Any) -> Any:
        return choose_kind(sizes, **{"whole": False, "passes": 1.0, "limit_bytes": 1000, **changes})

    assert choose() == "hidden"
    assert choose(limit_bytes=50) == "top_k"
    assert choose(limit_bytes=10) is None
    assert choose(limit_bytes=50, whole=True) is None
    assert choose(passes=0.3) is None
    assert choose(passes=0.3, complete=("top_k",)) == "top_k"
    assert choose(limit_bytes=10, complete=("hidden", "top_k")) == "hidden"
    assert choose(passes=0.3, complete=("top_k",), whole=True) is None


def test_a_second_run_reads_the_first_ones_cache_and_trains_alike(model_folder, pairs_file, tmp_path, monkeypatch):
    def trained(name: str, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        step = llmlite.DistillWhiteBox(**{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 3e-3, **options})
        run = dataclasses.replace(context(model_folder, pairs_file), scratch=tmp_path / name)
        model = step.apply(run.load_base(), run)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), run.notes

    cached, notes = trained("a", cache="hidden")
    assert notes["teacher_cache"] == "hidden"
    live, notes = trained("b", cache="none")
    assert "teacher_cache" not in notes
    start = torch.cat([parameter.detach().flatten() for parameter in context(model_folder, pairs_file).load_base().parameters()])
    assert (cached - live).norm() < 0.05 * (live - start).norm()

    monkeypatch.setattr(TeacherModel, "load", lambda self: pytest.fail("the teacher was loaded"))
    assert trained("c", cache="auto", learning_rate=1e-3, max_steps=1)[1]["teacher_cache"] == "hidden"
