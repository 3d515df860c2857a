#!/usr/bin/env bash
# Diffusion on pixels and on latents, the same steps and as many channels at each resolution (Rombach et al. 2022, Sec. 4.1).
# pixel_vs_latent.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the models so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/pixel-vs-latent}"
pixels=$(ldmkit train-ae "$here/data" --preset identity --preprocessing.size 64 --out "$out/pixels/ae")
ae="${AE:-$(ldmkit train-ae "$here/data" --preset tiny --out "$out/latent/ae")}"
for space in pixels latent; do
  [ "$space" = pixels ] && codec="$pixels" deep=(--unet.channels 16 --unet.multipliers 1,2,4,8,8 --unet.attention-factors 16 --unet.norm-groups 4) || codec="$ae" deep=()
  latents=$(ldmkit encode "$here/data" --ae "$codec" --out "$out/$space/latents")
  ldm=$(ldmkit train-diffusion "$latents" --preset tiny --condition class --holdout 0.05 ${STEPS:+--steps "$STEPS"} "${deep[@]}" --out "$out/$space/ldm")
  ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance 3 | ldmkit decode --ae "$codec" --out "$out/$space/samples" > /dev/null
done
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/pixels/samples" "$out/latent/samples" --told class
