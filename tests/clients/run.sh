#!/bin/sh
# Try exports in other people's programs: diffusers, mflux, ggml and stable-diffusion.cpp. `make clients` calls this file.
# An hour on two cores, most of it the build of stable-diffusion.cpp and a model of SD3-Medium's size; 12 GB of disk.
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-/tmp/w4a8-clients}
ours=.venv/bin/python
theirs=${CLIENTS_PYTHON:-.venv-clients/bin/python} # a Python that has them already
if [ -z "${CLIENTS_PYTHON:-}" ] && [ ! -f .venv-clients/installed ]; then
    $ours -m venv .venv-clients
    .venv-clients/bin/pip install -q -r tests/clients/requirements.txt
    .venv-clients/bin/pip install -q --no-deps mflux==0.24.0 # it asks for MLX with CUDA on Linux
    touch .venv-clients/installed
fi
mkdir -p "$folder"
for model in m4 l2 f1 d1; do
    $ours tests/clients/models.py $model "$folder/$model" > "$folder/$model.log" 2>&1
done
for bias in 0.2 1.0; do
    $ours tests/clients/models.py m4 "$folder/m4-$bias" --k-bias $bias > "$folder/m4-$bias.log" 2>&1
done
$theirs tests/clients/in_diffusers.py "$folder/m4" "$folder/m4-0.2" "$folder/m4-1.0" "$folder/l2" "$folder/f1" "$folder/d1" \
    2> "$folder/diffusers.log"
$theirs tests/clients/in_mflux.py "$folder/f1" "$folder/d1"
$ours tests/clients/in_ggml.py make "$folder/ggml.npz"
$theirs tests/clients/in_ggml.py compare "$folder/ggml.npz"
$ours tests/clients/models.py m24 "$folder/m24" > "$folder/m24.log" 2>&1
$theirs tests/clients/in_stable_diffusion_cpp.py "$folder/m24" 2> "$folder/stable-diffusion.log"
