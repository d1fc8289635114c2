"""nvrtc.py DIR FILE.cu...: compiles CUDA C++ to machine code for several generations of GPUs, without a GPU or CUDA.

DIR holds the unpacked PyPI wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime. Called by kernels/check.sh.
"""

import ctypes
import pathlib
import re
import sys

ARCHITECTURES = ["sm_87", "sm_89", "sm_90a", "sm_120a"]  # Orin, RTX 4090, H100, RTX 5090


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    library = next(root.rglob("libnvrtc.so*"))
    include = next(root.rglob("cuda_fp16.h")).parent
    rtc = ctypes.CDLL(str(library))
    bad = 0
    for path in map(pathlib.Path, sys.argv[2:]):
        source = path.read_bytes()
        for architecture in ARCHITECTURES:
            options = [f"-arch={architecture}", "-std=c++17", f"-I{include}", "-default-device"]
            options += ["-DSLANG_CUDA_ENABLE_HALF", "-DSLANG_CUDA_ENABLE_BF16", "-DSLANG_CUDA_RTC=1"]
            program = ctypes.c_void_p()
            rtc.nvrtcCreateProgram(ctypes.byref(program), source, path.name.encode(), 0, None, None)
            array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
            failed = rtc.nvrtcCompileProgram(program, len(options), array)
            size = ctypes.c_size_t()
            if failed:
                rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
                log = ctypes.create_string_buffer(size.value)
                rtc.nvrtcGetProgramLog(program, log)
                errors = [line for line in log.value.decode().splitlines() if "error" in line]
                print(f"{path.stem} {architecture}: FAILED", *errors[:5], sep="\n    ")
                bad += 1
            else:
                rtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
                rtc.nvrtcGetPTXSize(program, ctypes.byref(text := ctypes.c_size_t()))
                ptx = ctypes.create_string_buffer(text.value)
                rtc.nvrtcGetPTX(program, ptx)
                products = sorted(set(re.findall(r"(?:mma|wmma\.mma)\.sync\S*|dp4a\S*", ptx.value.decode())))
                print(f"{path.stem} {architecture}: {size.value} bytes of machine code", *products[:2])
            rtc.nvrtcDestroyProgram(ctypes.byref(program))
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
