#!/usr/bin/env bash
# Pictures of what a caption says, by a text encoder that is trained along.
# text_to_image.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the model so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/text-to-image}"
ae="${AE:-$(ldmkit train-ae "$here/data" --preset tiny --out "$out/ae")}"
latents=$(ldmkit encode "$here/data" --ae "$ae" --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --holdout 0.05 ${STEPS:+--steps "$STEPS"} --ae "$ae" --out "$out/ldm" \
  --lr 7e-4 --clip-norm 1 --unet.attention-factors 2,4 --condition text --text.depth 1 --text.vocabulary own --text.vocabulary-size 4096 --text.length 20)
ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance 3 | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/samples" --told text
