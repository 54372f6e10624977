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

timeout 150 "$python" -m pytest -q -p no:cacheprovider tests/core/test_cuda.py tests/run/test_cuda_runs.py \
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

for row in 1 2 3 5 6 7 9 12 4; do  # one by one, so that what was measured is there if time runs out
  timeout 35 "$python" -m tinylora_mtl.lab.bench --model "$out/model" --device "$device" --dtype bfloat16 \
    --rows "$row" --repeats "${REPEATS:-5}" --out "$out/row-$row.json" > "$out/row-$row.txt" 2>&1 ||
    echo "row $row was not measured: $(tail -n 1 "$out/row-$row.txt")"
done

"$python" - "$out" <<'RESULT'
import glob
import json
import sys
import torch
rows = [json.load(open(name)) for name in sorted(glob.glob(f"{sys.argv[1]}/row-*.json"))]
figures = [figure for row in rows for figure in row["figures"]]
tests = open(f"{sys.argv[1]}/tests.txt").read().splitlines()[-1:]
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
result = {"card": card, "torch": torch.__version__, "tests": tests, "figures": figures}
json.dump(result, open(f"{sys.argv[1]}/gpu.json", "w"), indent=2)
print(card, *tests, *(f"{f['row']} {f['what']}, {f['quantity']}, {f['on']}: {f.get('ratio')}" for f in figures), sep="\n")
RESULT
