#!/usr/bin/env bash
# What a GPU can tell: the tests that need one, then the rows of the bench that make sense there, on a random model of
# Qwen2.5-0.5B's shape in bfloat16. Ends within eight minutes, needs no network, and writes OUT/gpu.json.
#
#     tests/gpu_check.sh [OUT]                 from the repository root; PYTHON, DEVICE and REPEATS may be set
set -uo pipefail
out=${1:-runs/gpu}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TINYLORA_TEST_DEVICE="$device"

timeout 180 "$python" -m pytest -q -p no:cacheprovider tests/core/test_cuda.py tests/run/test_cuda_runs.py \
  2>&1 | tee "$out/tests.txt"

"$python" - "$out/model" "${SMALL:-}" <<'MODEL' || exit 1
import sys
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from tinylora_mtl.run.models import load_model
tokenizer = load_model("mini", "cpu")[1]
shape = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
             num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
if sys.argv[2]:  # to try the script itself
    shape |= dict(vocab_size=2000, hidden_size=112, intermediate_size=256, num_hidden_layers=2)
torch.manual_seed(0)
special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)
Qwen2ForCausalLM(Qwen2Config(**shape, **special)).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
MODEL

timeout 270 "$python" -m tinylora_mtl.lab.bench --model "$out/model" --device "$device" --dtype bfloat16 \
  --rows 1 2 3 6 7 8 10 5 4 --repeats "${REPEATS:-7}" --out "$out/bench.json"  # what was measured is there if time ends

"$python" - "$out" <<'RESULT'
import json
import sys
bench = json.load(open(f"{sys.argv[1]}/bench.json"))
tests = open(f"{sys.argv[1]}/tests.txt").read().splitlines()[-1:]
json.dump({"tests": tests, "bench": bench}, open(f"{sys.argv[1]}/gpu.json", "w"), indent=2)
print(*tests, bench["on"], sep="\n")
RESULT
