#!/bin/sh
# What an installed wheel does without the clone, in an empty folder, every recipe by its name:
#   sh tests/wheel.sh ENVIRONMENT/bin
# `make wheel` makes the environment; the release workflow runs this before it publishes. About four minutes on two cores.
set -eu
MAE=$(cd "$1" && pwd)/mae
PYTHON=$(dirname "$MAE")/python
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
set -x

"$PYTHON" -c 'import mae_core; assert "site-packages" in mae_core.__file__, f"this is no installed wheel: {mae_core.__file__}"'
"$MAE" digits data --image-size 48 --clutter 0.5 --unlabelled 60 --train 20 --test 10 --workers 1
"$MAE" check images data/unlabelled
"$MAE" check coco data/detection
"$MAE" check labels digits data_root=data/segmentation

"$MAE" pretrain digits data.path=data/unlabelled output=runs/mine optim.epochs=1 optim.warmup_epochs=0 optim.batch_size=16 data.workers=0
"$MAE" reconstruct runs/mine data/unlabelled --out strip.png
"$MAE" map runs/mine data/unlabelled --out map.html
"$MAE" export runs/mine --onnx --out encoder.onnx
"$MAE" export runs/mine --torch-export --out encoder.pt2

"$MAE" classify train digits weights=runs/mine data.path=data/classification output=runs/classes optim.epochs=1 optim.warmup_epochs=0 optim.batch_size=10
"$MAE" classify predict runs/classes data/unlabelled --out named
"$MAE" classify export runs/classes --onnx --out classes.onnx

"$MAE" detect train digits weights=runs/mine data.path=data/detection output=runs/detector optim.epochs=1 optim.warmup_epochs=0 optim.batch_size=10
"$MAE" detect evaluate weights=runs/detector data.path=data/detection output=runs/scores
"$MAE" detect predict runs/detector data/detection/val --out found
"$MAE" detect export runs/detector --out detector.onnx

"$MAE" segment train digits weights=runs/mine data.path=data/segmentation output=runs/segmenter train_cfg.max_iters=4 train_dataloader.batch_size=4
"$MAE" segment evaluate digits weights=runs/segmenter data.path=data/segmentation output=runs/segmenter_scores
"$MAE" segment predict runs/segmenter data/segmentation/images/validation --out labelled
"$MAE" segment export runs/segmenter --to onnx --size 48 48 --out segmenter.onnx

set +x
for made in map.html encoder.onnx encoder.pt2 named/predictions.csv classes.onnx found/predictions.json detector.onnx \
  labelled/labels segmenter.onnx runs/detector/metrics.json runs/segmenter/report.html; do
  [ -e "$made" ] || { echo "error: $made is missing" >&2; exit 1; }
done
echo "the wheel pre-trained, classified, detected, segmented, predicted and exported by name"
