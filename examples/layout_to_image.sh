#!/usr/bin/env bash
# Boxes with classes to pictures that have such objects there.
# layout_to_image.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the model so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/layout-to-image}"
python "$here/compose.py" "$here/data" "$out/data" --count 20000 --canvas white > /dev/null
ae="${AE:-$(ldmkit train-ae "$out/data/images" --preset tiny --steps 2500 --disc.weight 0 --loss.kl-weight 1e-7 --out "$out/ae")}"
latents=$(ldmkit encode "$out/data/instances.json" --images "$out/data/images" --ae "$ae" --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --holdout 0.05 --steps "${STEPS:-16000}" --cooldown 5000 --ae "$ae" --out "$out/ldm" \
  --clip-norm 1 --unet.attention-factors 2,4 --objective.draw.distribution logit-normal --objective.draw.logit-mean 0.5 --condition layout --layout.depth 2 --layout.heads 4 --layout.head-width 32 --layout.objects 3 --layout.vocabulary 101)
ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance 4 | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/samples" --told layout
