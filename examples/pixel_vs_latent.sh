#!/usr/bin/env bash
# Diffusion on pixels and on latents, the same steps and as many channels at each resolution (Rombach et al. 2022, Sec. 4.1).
# pixel_vs_latent.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the models so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/pixel-vs-latent}"
diffuse() { # FOLDER AUTOENCODER OPTIONS...
  latents=$(ldmkit encode "$here/data" --ae "$2" --out "$out/$1/latents")
  ldm=$(ldmkit train-diffusion "$latents" --preset tiny --condition class --holdout 0.05 ${STEPS:+--steps "$STEPS"} "${@:3}" --out "$out/$1/ldm")
  ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance 3 | ldmkit decode --ae "$2" --out "$out/$1/samples" > /dev/null
}
pixels=$(ldmkit train-ae "$here/data" --preset identity --preprocessing.size 64 --out "$out/pixels/ae")
diffuse pixels "$pixels" --unet.channels 16 --unet.multipliers 1,2,4,8,8 --unet.attention-factors 16 --unet.head-channels 16 --unet.norm-groups 4
ae="${AE:-$(ldmkit train-ae "$here/data" --preset tiny --out "$out/latent/ae")}"
diffuse latent "$ae"
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/pixels/samples" "$out/latent/samples" --told class
