#!/usr/bin/env bash
# Virtual environments of their own for the programs we measure against: make_peers.sh [FOLDER]
set -euo pipefail
folder=${1:-peers}
python3 -m venv "$folder/litgpt-0.5.13"
# transformers 5 and jsonargparse 4.42 came after this release and break it.
"$folder/litgpt-0.5.13/bin/pip" install 'litgpt[extra]==0.5.13' 'transformers<5' 'jsonargparse<=4.41'
# 4-bit weights on CPUs; built from source, without AMX, in about five minutes.
python3 -m venv "$folder/llama-cpp"
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DGGML_AVX2=ON -DGGML_FMA=ON \
  -DGGML_F16C=ON -DGGML_AMX_INT8=OFF -DGGML_AMX_TILE=OFF" \
  "$folder/llama-cpp/bin/pip" install --no-binary llama-cpp-python 'llama-cpp-python[server]'
echo "For --peer: $folder/litgpt-0.5.13/bin/litgpt"
echo "For --peers: $folder"
