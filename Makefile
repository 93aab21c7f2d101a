# `make demo` and `make test` set everything up themselves; the environment is made once, in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo demo-nlvr demo-clip scenes test test-slow lint format bench clean

setup: $(READY)

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for file in id pruner train generate sparse; do $(BIN)/python -m benchmarks.$$file || exit; done

# The paper's experiment on the embedded data: IDs, then pruning without and with them, 80 % and 95 %.
RUN     := $(BIN)/python
CAPTION := $(RUN) train_caption.py --config configs/caption_demo.yaml --output_dir output/demo
PRUNE   := $(CAPTION) --max_steps 160 --warmup_steps 32 --eval_epochs 0 --resume off
WITH_ID := --id_profile output/demo/ID/profile.json

scenes: setup
	$(RUN) -m data.scenes --out datasets/scenes

demo: scenes
	$(RUN) ComputeID.py --config configs/caption_demo.yaml -n 500 --Path output/demo/ID
	$(PRUNE) --model_dir PLATON80 --final_threshold 0.2
	$(PRUNE) --model_dir PLATON80-ID --final_threshold 0.2 $(WITH_ID)
	$(PRUNE) --model_dir PLATON95 --final_threshold 0.05
	$(PRUNE) --model_dir PLATON95-ID --final_threshold 0.05 $(WITH_ID)
	$(CAPTION) --evaluate --model_dir dense
	$(CAPTION) --evaluate --model_dir PLATON80 --pruned output/demo/PLATON80
	$(CAPTION) --evaluate --model_dir PLATON80-ID --pruned output/demo/PLATON80-ID
	$(CAPTION) --evaluate --model_dir PLATON95 --pruned output/demo/PLATON95
	$(CAPTION) --evaluate --model_dir PLATON95-ID --pruned output/demo/PLATON95-ID
	$(RUN) -m evaluation.tables output/demo dense PLATON80 PLATON80-ID PLATON95 PLATON95-ID
	rm -f output/demo/PLATON95-ID.safetensors
	$(RUN) export.py --config configs/caption_demo.yaml --pruned output/demo/PLATON95-ID --to compressed --out output/demo/PLATON95-ID.safetensors --report

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
	$(RUN) -m evaluation.tables output/demo-nlvr dense PLATON80 PLATON80-ID

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
	$(RUN) -m evaluation.tables output/demo-clip dense PLATON80 PLATON80-ID --ids output/demo-clip/ID

clean:
	rm -rf $(VENV) datasets/scenes output/demo output/demo-nlvr output/demo-clip
