#!/usr/bin/env bash
# llama.cpp's server, plain and speculative, built from the source that llama-cpp-python ships, into .venv-peers/bin.
# Ten minutes on two cores. JOBS=2 bounds the compiler's processes.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${LLAMA_CPP_PYTHON:-0.3.36}
venv=$PWD/.venv-peers
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv"/bin/python -m pip install --quiet "cmake>=3.28" "ninja>=1.11"
source=$venv/source
if [ ! -d "$source/llama_cpp_python-$version" ]; then
    "$venv"/bin/python -m pip download --no-deps --no-binary llama-cpp-python -d "$source" "llama-cpp-python==$version"
    tar -xzf "$source/llama_cpp_python-$version.tar.gz" -C "$source"
fi
PATH=$venv/bin:$PATH
# No downloads by its build, no web page, one file a program.
cmake -S "$source/llama_cpp_python-$version/vendor/llama.cpp" -B "$venv/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_APP=OFF
ninja -C "$venv/build" -j "${JOBS:-2}" llama-server
cp "$venv/build/bin/llama-server" "$venv/bin/"
