#!/usr/bin/env bash
# Virtual environments of their own for the programs we measure against: make_peers.sh [FOLDER]
set -euo pipefail
folder=${1:-peers}
python3 -m venv "$folder/litgpt-0.5.13"
# transformers 5 and jsonargparse 4.42 came after this release and break it.
"$folder/litgpt-0.5.13/bin/pip" install 'litgpt[extra]==0.5.13' 'transformers<5' 'jsonargparse<=4.41'
echo "For --peer: $folder/litgpt-0.5.13/bin/litgpt"
