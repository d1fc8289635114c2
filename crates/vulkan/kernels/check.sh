#!/usr/bin/env bash
# check.sh [DIR]: what can be said of the kernels that no driver here runs (16 x 16 matrices, bf16). spirv-val looks at the
# committed binaries; and their sources as CUDA C++ are compiled to machine code for four generations of NVIDIA's GPUs by
# NVRTC, which needs no GPU: a second opinion by another compiler. Wheels from PyPI go to DIR, and are found there again.
# Needs $SLANGC or slangc, Python with pip, and $SPIRV_VAL or spirv-val.
set -euo pipefail
dir=$(realpath -m "${1:-../../../target/nvrtc}")
cd "$(dirname "$0")"
for binary in spv/*.spv; do ${SPIRV_VAL:-spirv-val} --target-env vulkan1.3 "$binary"; done
echo "spirv-val: $(ls spv/*.spv | wc -l) binaries are valid"
mkdir -p "$dir"
if [ ! -d "$dir/wheels" ]; then
    python3 -m pip -q download --no-deps -d "$dir" nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-runtime==13.5.37
    for wheel in "$dir"/*.whl; do python3 -m zipfile -e "$wheel" "$dir/wheels.new"; done
    mv "$dir/wheels.new" "$dir/wheels"
fi
rm -rf "$dir/cuda"
TARGET=cuda ./build.sh "$dir/cuda" 2>/dev/null
python3 ../../../tools/nvrtc.py "$dir/wheels" "$dir"/cuda/*.cu
