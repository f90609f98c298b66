#!/usr/bin/env bash
# compute-sanitizer over own kernels on small shapes; from the repository's root on the GPU machine:
#   LIMIT=60 AT_ONCE=12 bash benchmarks/sanitize.sh     logs in $OUT/sanitize.tgz; the summary is printed
#   ONLY="hopper72f hopper72b" TOOLS=memcheck ...       those groups, by that tool
# Kernels are compiled by plain runs before, whose cache the tools' runs find. About three minutes at most.
set -u
OUT=${OUT:-/tmp/out}; LIMIT=${LIMIT:-60}; PRINT=${PRINT:-20}; AT_ONCE=${AT_ONCE:-12}
export PYTHONPATH=. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TRITON_CACHE_DIR=/tmp/sanitize_cache CUDA_MODULE_LOADING=LAZY
export PYTORCH_NO_CUDA_MEMORY_CACHING=1   # every tensor an allocation of its own
LOGS=/tmp/sanitize_logs; rm -rf $LOGS; mkdir -p $LOGS $OUT
SAN=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -1)
[ -n "$SAN" ] || { echo "no compute-sanitizer"; exit 1; }
$SAN --version | tail -1
HELP=$($SAN --help 2>&1)
FILTER=--kernel-regex; grep -q -- '--kernel-name ' <<<"$HELP" && FILTER=--kernel-name
KERNELS=""; for k in $(python benchmarks/sanitize.py --kernels); do KERNELS="$KERNELS $FILTER kns=$k"; done
MEM=""; grep -q -- '--padding' <<<"$HELP" && MEM="--padding 4096"
grep -iE -A1 -- 'warpgroup|wgmma|mbarrier|racecheck-' <<<"$HELP" | head -20
GROUPS_=${ONLY:-$(python benchmarks/sanitize.py --groups)}
start=$SECONDS
for g in $GROUPS_; do timeout 90 python benchmarks/sanitize.py $g > $LOGS/plain.$g.log 2>&1 & done; wait
echo "plain runs, compiled: $((SECONDS-start)) s"; grep -hE "^(WRONG|END|NOT HERE|.*Error)" $LOGS/plain.*.log | cut -c1-200 | sort | uniq -c | head -40

one() {
  tool=$1 group=$2 more=""; [ $tool = memcheck ] && more="$MEM"
  timeout -s INT -k 5 $LIMIT $SAN --tool $tool $more $KERNELS --print-limit $PRINT python benchmarks/sanitize.py $group > $LOGS/$tool.$group.log 2>&1
  echo "rc $? $tool $group" >> $LOGS/rc
}
export -f one; export SAN MEM KERNELS LIMIT LOGS PRINT
for t in ${TOOLS:-racecheck memcheck synccheck}; do for g in planted $GROUPS_; do echo $t $g; done; done |
  xargs -P $AT_ONCE -L 1 bash -c 'one $0 $1'
echo "tools: $((SECONDS-start)) s in all"
python benchmarks/sanitize.py --summary $LOGS 2>&1 | tee $OUT/sanitize.txt
echo "planted faults, one for each tool (all three must be found):"
grep -m2 -hE "^=========.*(Invalid|[Rr]ace reported|Barrier error|Divergent)" $LOGS/*.planted.log || echo "NOTHING FOUND: the filters or the tool do not work"
tar czf $OUT/sanitize.tgz -C $LOGS .
