# `make demo` and `make test` set everything up themselves; the environment is made once, in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo demo-ID demo-plain demo-dense demo-nlvr demo-clip scenes test test-slow test-gpu lint format bench clean

setup: $(READY)

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the rest of requirements.txt into $(VENV): 2 GB, more with CUDA"
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

# Tests side by side, because many of them wait for processes; small models want one thread. One file
# with `make test FILE=tests/test_x.py`, in one process.
FILE   :=
SPREAD := --numprocesses auto --maxprocesses 8 --dist worksteal

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(FILE),$(SPREAD))

test-slow: setup
	$(BIN)/python -m pytest -m slow

# On the accelerator that is there, else on a simulated one: what runs on a GPU, then the scripts.
ON_GPU := test_trainers test_resume test_compute_id test_caption_script test_export

test-gpu: setup
	$(BIN)/python -m pytest -rs -m "not slow" tests/test_accelerator.py tests/test_generation.py tests/test_gpu.py
	$(BIN)/python -m pytest -rs -m "not slow and not cpu" --accelerator $(ON_GPU:%=tests/%.py)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for file in id pruner train generate sparse; do $(BIN)/python -m benchmarks.$$file || exit; done

# The paper's experiment on the embedded data: IDs, then pruning without and with them, 90 %, with the
# settings of docs/study.md. For so small a model two processes of one thread do more than one of two.
RUN     := $(BIN)/python
CAPTION := $(RUN) train_caption.py --config configs/caption_demo.yaml --output_dir output/demo --num_workers 0
PRUNE   := $(CAPTION) --batch_size 32 --init_lr 5e-4 --max_steps 130 --warmup_steps 26 --final_threshold 0.1 --eval_epochs 0 --resume off
RUNS    := output/demo/dense output/demo/PLATON90 output/demo/PLATON90-ID

scenes: setup
	$(RUN) -m data.scenes --out datasets/scenes

demo: export OMP_NUM_THREADS = 1
demo: scenes
	$(MAKE) --no-print-directory --jobs 2 demo-ID demo-plain demo-dense
	rm -f output/demo/PLATON90-ID.safetensors
	$(RUN) export.py --config configs/caption_demo.yaml --pruned output/demo/PLATON90-ID --to compressed --out output/demo/PLATON90-ID.safetensors
	$(RUN) -m reports.report $(RUNS)
	@echo "next: open the page; prune a model of your own (python prune.py --help); README.md has the paper's commands"

demo-ID:
	$(RUN) ComputeID.py --config configs/caption_demo.yaml -n 500 --Path output/demo/ID
	$(PRUNE) --model_dir PLATON90-ID --id_profile output/demo/ID/profile.json
	$(CAPTION) --evaluate --pruned output/demo/PLATON90-ID

demo-plain:
	$(PRUNE) --model_dir PLATON90
	$(CAPTION) --evaluate --pruned output/demo/PLATON90

demo-dense:
	$(CAPTION) --evaluate --model_dir dense

# The same for statements about pairs of pictures, 80 %.
NLVR       := $(RUN) train_nlvr.py --config configs/nlvr_demo.yaml --output_dir output/demo-nlvr
PRUNE_NLVR := $(NLVR) --max_steps 200 --warmup_steps 40 --final_warmup 1 --eval_epochs 0 --resume off

demo-nlvr: scenes
	$(RUN) ComputeID.py --config configs/nlvr_demo.yaml -n 500 --Path output/demo-nlvr/ID
	$(PRUNE_NLVR) --model_dir PLATON80 --final_threshold 0.2
	$(PRUNE_NLVR) --model_dir PLATON80-ID --final_threshold 0.2 --id_profile output/demo-nlvr/ID/profile.json
	$(NLVR) --evaluate --model_dir dense
	$(NLVR) --evaluate --model_dir PLATON80 --pruned output/demo-nlvr/PLATON80
	$(NLVR) --evaluate --model_dir PLATON80-ID --pruned output/demo-nlvr/PLATON80-ID
	$(RUN) -m reports.report $(addprefix output/demo-nlvr/,dense PLATON80 PLATON80-ID)

# The same for retrieval between pictures and captions, 80 %.
CLIP       := $(RUN) train_clip_flickr30k.py --config configs/retrieval_demo.yaml --output_dir output/demo-clip
PRUNE_CLIP := $(CLIP) --max_steps 160 --warmup_steps 32 --final_warmup 1 --eval_epochs 0 --resume off

demo-clip: scenes
	$(RUN) ComputeID.py --config configs/retrieval_demo.yaml -n 500 --Path output/demo-clip/ID
	$(PRUNE_CLIP) --model_dir PLATON80 --final_threshold 0.2
	$(PRUNE_CLIP) --model_dir PLATON80-ID --final_threshold 0.2 --id_profile output/demo-clip/ID/profile.json
	$(CLIP) --evaluate --model_dir dense
	$(CLIP) --evaluate --model_dir PLATON80 --pruned output/demo-clip/PLATON80
	$(CLIP) --evaluate --model_dir PLATON80-ID --pruned output/demo-clip/PLATON80-ID
	$(RUN) -m reports.report $(addprefix output/demo-clip/,dense PLATON80 PLATON80-ID)

clean:
	rm -rf $(VENV) datasets/scenes output/demo output/demo-nlvr output/demo-clip
