#!/usr/bin/env bash
# get-slangc.sh DIR: the Slang compiler from the PyPI wheel `slangpy` as DIR/slangc, for those without the Vulkan SDK.
# Needs Python with pip, and a C++ compiler.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(realpath -m "$1")
mkdir -p "$dir"
python3 -m pip -q download --no-deps -d "$dir" slangpy==0.43.1
(cd "$dir" && python3 -m zipfile -e slangpy-*.whl wheel)
library=$(find "$dir/wheel" -name 'libslang-compiler.so*' | head -1)
include=$(dirname "$(find "$dir/wheel" -name slang.h | head -1)")
c++ -std=c++17 -I"$include" "$here/slangc.cpp" "$library" -Wl,-rpath,"$(dirname "$library")" -o "$dir/slangc"
"$dir/slangc" -v
