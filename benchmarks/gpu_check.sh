#!/usr/bin/env bash
# Does everything run on a CUDA card? Training, Ctrl-C, resuming, sampling, chat, fine-tuning, fp16,
# compilation, 1b within the memory of smaller cards, the tests on the card, a short benchmark.
#
#     benchmarks/gpu_check.sh                        # in the root of the repository: all checks
#     benchmarks/gpu_check.sh out/gpu                # the output of each goes into this folder
#     benchmarks/gpu_check.sh out/gpu train resume   # some by name; see CHECKS
#     DEVICE=cpu LIMIT=1200 benchmarks/gpu_check.sh  # without a card: what can be tried there
#
# It takes at most 15 minutes (LIMIT, in seconds; what is not done by then fails), 18 GB of disk, no
# network, and requirements.txt. Without pytest, transformers and peft the tests are skipped. The
# exit code is 1 if a check failed.

set -a  # every check runs in a bash of its own and needs what is defined here
DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-900} OUT=${1:-$(mktemp -d)}
BENCH=benchmarks.speed
[[ $DEVICE == cuda* ]] && SLOWER=1 || SLOWER=4
RUNS=$OUT/runs  # what one check leaves for the next: resume needs interrupt, others need train
TORCHINDUCTOR_CACHE_DIR=$OUT/runs/inductor  # a killed check may leave half a file in it
CHECKS=(  # and the seconds that each may take on a card
  machine:60 train:120 interrupt:90 resume:120 sample:120 chat:60 score:60 finetune:120 fp16:60
  compile:120 1b_whole:120 1b:120 1b_fp16:150 1b_low_memory:120 tests:180 bench:240
)

# The last line that a check prints is its key figure, or the reason why it failed or was skipped.
fail() { echo "$*"; exit 1; }
skip() { echo "$*"; exit 77; }
repeat() { grep -e "$1" "$LOG" | tail -n 1; }  # a line of what was printed so far
needs() { for m in "$@"; do python -c "import $m" || skip "$m is not installed"; done; }
needs_card() { [[ $DEVICE == cuda* ]] || skip "needs a CUDA card"; }

train() {  # the name of a new run, flags
  rm -rf "${RUNS:?}/$1"
  python train.py --device "$DEVICE" --out "$RUNS/$1" --eval_tokens 5000 --eval_every 30 "${@:2}"
}

sample() { python sample.py --device "$DEVICE" --ckpt "$RUNS/tiny/ckpt.pt" --seed 1 "$@"; }

losses() {  # the name of a run: all are finite, and the last is lower than the first
  python - "$RUNS/$1/log.jsonl" <<'END'
import json, math, statistics, sys
steps = [r for r in map(json.loads, open(sys.argv[1])) if "step" in r]
losses = [r.get("loss", math.nan) for r in steps]  # a step that was left out has none
figures = f"loss {losses[0]:.2f} to {losses[-1]:.2f}"
if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
    sys.exit(f"not all finite, or not falling: {figures}")
seconds = steps[0]["tokens"] / steps[0]["tok_per_s"]
speed = statistics.median(r["tok_per_s"] for r in steps[len(steps) // 2 :])
print(f"{figures}, first step {seconds:.1f} s, then {speed:,.0f} tok/s")
END
}

capped() {  # GiB, the name of a new run, flags: trains 1b with no more of the card
  needs_card
  local cap share figures
  cap=$(python -c "print(int($1 * 2**30))")
  share=$(python -c "import torch
print($cap / torch.cuda.get_device_properties('$DEVICE').total_memory)")
  [[ $share == 0.* ]] || skip "the card has less than $1 GiB"
  rm -rf "${RUNS:?}/$2"
  PYTORCH_CUDA_ALLOC_CONF=per_process_memory_fraction:$share python - --size 1b \
    --device "$DEVICE" --out "$RUNS/$2" --eval_tokens 2000 --eval_every 1000 "${@:3}" <<END
import runpy, sys, torch
if torch.cuda.mem_get_info("$DEVICE")[0] < 1.1 * $cap:
    sys.exit("the card is in use: what is free would tell nothing about the cap")
try:
    torch.empty(int(1.01 * $cap), dtype=torch.uint8, device="$DEVICE")
    sys.exit("the cap is not in force")
except torch.OutOfMemoryError:
    pass
runpy.run_path("train.py", run_name="__main__")
print(f"peak {torch.cuda.max_memory_reserved('$DEVICE') / 2**30:.1f} GiB of $1")
END
  rm -f "$RUNS/$2"/ckpt.*  # of 11 GB
  figures=$(losses "$2")
  echo "$figures, $(repeat '^peak'), $(repeat '^memory ' || echo "in one piece")"
}

check_machine() {
  python - <<END
import platform, torch
device = torch.device("$DEVICE")
x = torch.ones(256, 256, device=device)
assert (x @ x == 256).all(), "a product is wrong"
about = f"Python {platform.python_version()}, torch {torch.__version__}, {device}"
if device.type == "cuda":
    card = torch.cuda.get_device_properties(device)
    about += f", CUDA {torch.version.cuda}, {card.name}, capability {card.major}.{card.minor}"
    about += f", {card.total_memory / 2**30:.1f} GiB"
print(about)
END
}

check_train() {
  local place=${DEVICE/%cuda/cuda:0}  # without a number it is the first
  train tiny --steps 60
  grep -q "^machine  $place," "$LOG" || fail "the run does not say that its device is $place"
  losses tiny
}

check_interrupt() {
  rm -rf "$RUNS/long"
  python train.py --device "$DEVICE" --out "$RUNS/long" --eval_tokens 5000 --batch_size 2 \
    --steps 400 &
  until [[ -f $RUNS/long/log.jsonl && $(wc -l <"$RUNS/long/log.jsonl") -ge 30 ]]; do
    kill -0 $! || fail "it ended before 30 lines were in its log"
    sleep 0.1
  done
  kill -INT $!
  wait $! || fail "exit code $? after Ctrl-C"
  [[ -s $RUNS/long/ckpt.pt ]] || fail "there is no checkpoint"
  repeat --resume || fail "the run does not say how to go on"
}

check_resume() {
  python train.py --device "$DEVICE" --out "$RUNS/long" --resume
  [[ $(sed -n 's/^{"step": \([0-9]*\),.*/\1/p' "$RUNS/long/log.jsonl") == "$(seq 400)" ]] ||
    fail "the steps in its log are not 1 to 400, each once"
  repeat "^resumes "
}

check_sample() {
  local flags=(--prompt "Once upon a time" --max_new_tokens 60) once again
  once=$(sample "${flags[@]}")
  again=$(sample "${flags[@]}")
  [[ $once == "Once upon a time"?* ]] || fail "there is no text: $once"
  [[ $once == "$again" ]] || fail "the same --seed gave two texts: $once | $again"
  once=$(sample "${flags[@]}" --temperature 0)
  again=$(sample "${flags[@]}" --temperature 0 --compile)
  [[ $once == "$again" ]] || fail "compiled it says something else: $once | $again"
  echo "$once"
}

check_chat() {
  local said
  said=$(sample --chat --max_new_tokens 40 <<<"Write a short story with Una and a red ball.")
  [[ $said =~ [[:alpha:]] ]] || fail "there is no answer: $said"
  echo "$said" | grep -m 1 "[[:alpha:]]"
}

check_score() { sample --judge 20; sample --score LICENSE; }

check_finetune() {
  rm -rf "$RUNS/lora" "$RUNS/merged"
  python finetune.py --device "$DEVICE" --ckpt "$RUNS/tiny/ckpt.pt" --out "$RUNS/lora" --steps 30 \
    --data stories:500 --eval_tokens 5000 --eval_every 30
  sample --lora "$RUNS/lora" --max_new_tokens 40
  sample --lora "$RUNS/lora" --export "$RUNS/merged"
  sample --ckpt "$RUNS/merged" --max_new_tokens 40
  repeat "^held out, nats"
}

check_fp16() { needs_card; train fp16 --dtype float16 --steps 60; losses fp16; }
check_compile() {
  rm -rf "$TORCHINDUCTOR_CACHE_DIR"  # to see how long the first step takes
  train compile --compile on --steps 60
  losses compile
}
# A long run compiles by itself. First for comparison: as much memory as it likes.
check_1b_whole() { capped 75 1b_whole --compile on --steps 6; }
check_1b() { capped 22.5 1b --compile on --steps 6; }  # what a card of 24 GB has to give
check_1b_fp16() { capped 22.5 1b_fp16 --compile on --steps 4 --dtype float16; }
check_1b_low_memory() { capped 14.0 1b_low_memory --compile on --low_memory --steps 4; }

check_tests() {
  [[ -f tests/test_device.py ]] || skip "there is no tests/test_device.py"
  needs pytest transformers peft
  python -m pytest --device "$DEVICE" tests/test_device.py
}

check_bench() { python -m "$BENCH" --device "$DEVICE" --only decode --rounds 3; }

run() {  # a check, the most seconds
  local began=$SECONDS left=$((LIMIT - SECONDS)) code said
  ((left > 0)) || { failed+=1; echo "FAIL $1: no time is left of $LIMIT s"; return; }
  LOG=$OUT/$1.txt
  timeout -s KILL $((left < $2 ? left : $2)) bash -euo pipefail -c "check_$1" >"$LOG" 2>&1 &
  group=$!
  wait $group 2>/dev/null
  code=$?
  said=$(grep '[^[:space:]]' "$LOG" | tail -n 1 | tr -s ' ' | cut -c -250)
  case $code in
    0) passed+=1; echo "PASS $1 ($((SECONDS - began)) s, $said)" ;;
    77) skipped+=1; echo "SKIP $1: $said" ;;
    137) failed+=1; echo "FAIL $1: killed after $((SECONDS - began)) s; it had said: $said" ;;
    *) failed+=1; echo "FAIL $1: $said" ;;
  esac
}

declare -i passed=0 failed=0 skipped=0
mkdir -p "$RUNS" || exit
echo "the full output is in $OUT"
trap 'kill -KILL -- -$group; exit 130' INT TERM
trap 'rm -f "$RUNS"/1b*/ckpt.*' EXIT  # of 11 and 7 GB
for name in "${@:2}"; do
  [[ " ${CHECKS[*]}" == *" $name:"* ]] || { echo "there is no check $name"; exit 2; }
done
for check in "${CHECKS[@]}"; do
  (($# < 2)) || [[ " ${*:2} " == *" ${check%:*} "* ]] || continue
  run "${check%:*}" $((${check#*:} * SLOWER))
done
echo "$passed passed, $failed failed, $skipped skipped in $SECONDS s"
((failed == 0))
