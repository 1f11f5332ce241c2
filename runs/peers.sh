#!/usr/bin/env bash
# The other libraries that `glidecape bench --peers` runs, into .venv-peers: llama.cpp's server, built from the source that
# llama-cpp-python ships, and OpenVINO GenAI with optimum-intel, which exports to it, in an environment of its own.
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
(
    PATH=$venv/bin:$PATH
    # No downloads by its build, no web page, one file a program.
    cmake -S "$source/llama_cpp_python-$version/vendor/llama.cpp" -B "$venv/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_APP=OFF
    ninja -C "$venv/build" -j "${JOBS:-2}" llama-server
    cp "$venv/build/bin/llama-server" "$venv/bin/"
)

# optimum-intel without its own requirements: it asks for torchvision, of which it uses nothing here, and that for another torch.
openvino=$venv/openvino
[ -x "$openvino/bin/python" ] || "${PYTHON:-python3}" -m venv "$openvino"
"$openvino"/bin/python -m pip install --quiet "torch==2.13.0" "openvino-genai==2026.4.1.0" "transformers==5.5.4" \
    "requests>=2.33" setuptools
"$openvino"/bin/python -m pip install --quiet --no-deps "optimum==2.3.0" "optimum-intel==2.2.0"
printf '#!/bin/sh\nexec "%s/bin/python" "$@"\n' "$openvino" > "$venv/bin/openvino-python"
chmod +x "$venv/bin/openvino-python"
