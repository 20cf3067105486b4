#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked gpu, then the benches. Results go into a folder.
#
#     bench/gpu.sh RESULTS            everything
#     bench/gpu.sh RESULTS step small     some of: tests stress losses chains step small profile memory chamfer sanitize
#
# RESOLUTION (256) is that of step, profile and memory, BATCHES ("8 16 32 64") are those of step, SIVAE_STRESS (20000)
# is the number of launches of each stress test. SIVAE_COMMIT tells the results their commit where the copy that
# runs is no git repository or stands at another one. sanitize runs kernels under compute-sanitizer where that is
# installed.
#
# All of it takes about an hour, step most of that. Where the machine is lent for less: PART_SECONDS ends a part that
# takes longer, LOSSES ("--batches 16 64 --sizes image256 image32") and CHAINS ("--only encoder blur --sides 256 64")
# choose cases, ROWS ("plain;plain, compiled, bf16;minimal, bf16, graphs") rows of step.
#
# A bench writes its results after every case, and each part that ended has a line in RESULTS/parts.txt: what is
# there stays whole where the machine is taken away in between.
#
# Needs PyTorch with Triton, NumPy, safetensors, pydantic, PyYAML, Pillow, pytest, pytest-benchmark,
# pytest-xdist and hypothesis; without matplotlib there are no pictures. Without a GPU the same benches run on the
# CPU.
set -uo pipefail
out=$(mkdir -p "${1:?the folder of the results}" && cd "$1" && pwd)
parts=" ${*:2} "
for part in "${@:2}"; do
  [[ " tests stress losses chains step small profile memory chamfer sanitize " = *" $part "* ]] && continue
  echo "error: $part is no part, see the head of $0" >&2
  exit 2
done
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python3 -c "import sivae_fast.kernels" 2>/dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1
python3 -c "import sivae_fast.training.loop" || exit 1 # tells which package is missing
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')" \
  | tee "$out/machine.txt"
device=$(python3 -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
failed=0
run() { # NAME COMMAND...: keeps the output, goes on after a failure
  [ "$parts" = "  " ] || [[ $parts = *" $1 "* ]] || return
  echo "== $1"
  local code start=$SECONDS
  ${PART_SECONDS:+timeout "$PART_SECONDS"} "${@:2}" 2>&1 | tee "$out/$1.txt"
  code=${PIPESTATUS[0]}
  echo "$1: exit code $code after $((SECONDS - start)) s" | tee -a "$out/parts.txt"
  [ "$code" = 0 ] || [ "$code" = 5 ] || failed=1 # 5: pytest had nothing to run
}
pytest=(python3 -m pytest -o addopts="" -q -m gpu --benchmark-skip)
# Of all tests only these files: a collection of the others takes longer and needs more packages.
mapfile -t files < <(grep -rl --include="test_*.py" "mark\.gpu" tests)
# In JOBS (8) processes: some 500 kernels compile for a second each, which takes longer than they run.
run tests "${pytest[@]}" -n "${JOBS:-8}" --dist worksteal -k "not stress" "${files[@]}" \
  tests/kernels/triton_cases/test_*.py
SIVAE_STRESS=${SIVAE_STRESS:-20000} run stress "${pytest[@]}" tests/kernels/test_gpu.py -k stress
run losses python3 bench/losses.py ${LOSSES:-} --out "$out"
run chains python3 bench/chains.py ${CHAINS:-} --out "$out"
# ROWS: names of rows with a ; between them, since they have spaces and commas.
rows=()
[ -z "${ROWS:-}" ] || { IFS=";" read -ra rows <<< "$ROWS" && rows=(--only "${rows[@]}"); }
run step python3 bench/step.py --resolution "${RESOLUTION:-256}" --batches ${BATCHES:-8 16 32 64} \
  "${rows[@]}" --out "$out/step-$device.json"
run small python3 bench/small.py --out "$out/small-$device.json"
run profile python3 bench/step_profile.py --config launch/configs/ffhq256.yaml --out "$out" \
  data.path=quickstart data.loader=torch train.precision=bf16 model.resolution="${RESOLUTION:-256}"
run memory python3 bench/memory.py --resolution "${RESOLUTION:-256}" --batches 4 8 16 --out "$out"
run chamfer python3 bench/chamfer.py --batch 32 --out "$out"
if command -v compute-sanitizer > /dev/null; then
  # Every tensor in an allocation of its own, or an access past its end would meet its neighbour.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitize timeout 600 compute-sanitizer --error-exitcode 1 "${pytest[@]}" \
    tests/kernels/test_gpu.py tests/kernels/triton_cases -k "full_size or map_chains or map_layers or sizes or many_chunks"
elif [[ $parts = *" sanitize "* ]]; then
  echo "sanitize: compute-sanitizer is not installed" | tee "$out/sanitize.txt"
fi
exit $failed
