#!/usr/bin/env bash
# What this project does with TransformerEngine's experts, on the real package and without a GPU.
#
#   scripts/test_transformer_engine.sh            compare with the last result, docs/transformer_engine.txt
#   scripts/test_transformer_engine.sh --write    write it again
#
# TransformerEngine's torch extension has to be built from source: 33 C++ files, about 10 minutes on one core, once. It
# goes to SMARTMOE_TE_CACHE (default: ~/.cache/megatron_smartmoe_te), outside the repository; .venv is not touched. It is
# compiled without optimization, as nothing of it computes here. Not a part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."

version=2.20.2
cuda=13
cache="${SMARTMOE_TE_CACHE:-$HOME/.cache/megatron_smartmoe_te}/$version"
python="$PWD/.venv/bin/python"
# What transformer_engine.pytorch imports, beside what .venv has already.
packages=(
  "transformer-engine==$version" "transformer-engine-cu$cuda==$version"
  onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 ml-dtypes==0.6.0 einops==0.8.2 nvdlfw-inspect==0.2.2
  importlib-metadata==10.2.0 zipp
)

# Step 1: the packages that need no compiler
if [[ ! -d $cache/site/transformer_engine ]]; then
  mkdir -p "$cache"
  "$python" -m pip install --quiet --no-deps --target "$cache/site.new" "${packages[@]}"
  "$python" -m pip install --quiet --no-deps --target "$cache/build_tools" wheel
  mv "$cache/site.new" "$cache/site"
fi

# Step 2: the torch extension
build() {
  local nvcc_include="${CUDA_HOME:-/usr/local/cuda}/include"
  if [[ ! -e $nvcc_include/crt/host_config.h ]]; then
    echo "error: CUDA_HOME = '${CUDA_HOME:-/usr/local/cuda}': has no include/crt/host_config.h." \
      "Set it to the folder of a CUDA toolkit." >&2
    exit 2
  fi
  rm -rf "$cache/source"
  mkdir -p "$cache/source"
  "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$cache/source" \
    "transformer-engine-torch==$version"
  tar --extract --gzip --file "$cache/source/"*.tar.gz --directory "$cache/source" --strip-components 1
  # Every file spends most of its time on the same headers: they are compiled once.
  sed -i 's/"-O3", "-fvisibility/"-O0", "-fvisibility/' "$cache/source/build_tools/pytorch.py"
  printf '#!/bin/bash\nexec c++ -include "%s/csrc/extensions.h" "$@"\n' "$cache/source" > "$cache/source/cxx"
  chmod +x "$cache/source/cxx"
  (
    cd "$cache/source"
    # torch's wheels lack crt/host_config.h, which nvcc's headers have; these lack cublas, which torch's wheels have.
    export CPLUS_INCLUDE_PATH="$nvcc_include" C_INCLUDE_PATH="$nvcc_include" PYTHONPATH="$cache/build_tools"
    export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1
    export MAX_JOBS="${MAX_JOBS:-1}"
    # ninja's file has the compiler's options, with which the headers must be compiled too: a first run stops there.
    CXX="$cache/source/cxx" "$python" - "$cache/source" <<'PY'
import runpy, subprocess, sys
from pathlib import Path
from torch.utils import cpp_extension

folder = Path(sys.argv[1])


def precompile(build_directory: str, verbose: bool, error_prefix: str) -> None:
    lines = (Path(build_directory) / "build.ninja").read_text().splitlines()
    flags = {line.split(" = ")[0]: line.split(" = ", 1)[1] for line in lines if line.startswith(("cflags", "post_cflags"))}
    options = f"{flags['cflags'].removesuffix(' -c')} {flags['post_cflags']}"
    subprocess.run(f"c++ {options} -x c++-header csrc/extensions.h -o csrc/extensions.h.gch", shell=True, check=True, cwd=folder)
    compile_all(build_directory, verbose, error_prefix)


compile_all, cpp_extension._run_ninja_build = cpp_extension._run_ninja_build, precompile
sys.argv = ["setup.py", "build_ext", "--build-lib", str(folder / "built")]
runpy.run_path("setup.py", run_name="__main__")
PY
  )
  find "$cache/source/built" -name '*.so' -exec cp {} "$cache/site/" \;
  rm -rf "$cache/source"
}
compgen -G "$cache/site/transformer_engine_torch*.so" > /dev/null || build

# Step 3: cuDNN must be where TransformerEngine looks for it: beside it
if [[ ! -e $cache/site/nvidia ]]; then
  ln -sfn "$("$python" -c 'import nvidia.cudnn; print(list(nvidia.cudnn.__path__)[0])')/.." "$cache/site/nvidia"
fi

CUDA_VISIBLE_DEVICES="" PYTHONPATH="$cache/site" "$python" -m scripts.te_package.check "$@"
CUDA_VISIBLE_DEVICES="" PYTHONPATH="$cache/site" "$python" -m scripts.te_package.converted
