# The ViT-B recipe on one GPU of 24 GB: 4 images at a time, gradients of 4 such steps together, so that a step of the
# optimizer sees 16 images; blocks are recomputed in the backward pass. Four times as many iterations are the 160k steps
# of the recipe. Batch norm sees 4 images in place of 16, which the recipe's SyncBN sees over its GPUs. For scale:
# mae_segmentation needs 21 GB for 2 images without recomputation; this file's own need was not measured.
#
#   python transfer/segmentation/train_net.py configs/segmentation/mae_vit_base_upernet_one_gpu_ade20k_512x512.py \
#       --weights mae_pretrain_vit_base.pth --work-dir runs/ade20k --cfg-options data_root=data/ADEChallengeData2016
_base_ = ["mae_vit_base_upernet_160k_ade20k_512x512.py"]

batch_size = 4
accumulate = 4
iterations = 160000 * accumulate
warmup = 1500 * accumulate

model = dict(backbone=dict(checkpointing=True))
train_dataloader = dict(batch_size=batch_size)
optim_wrapper = dict(accumulative_counts=accumulate)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warmup),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=warmup, end=iterations, by_epoch=False),
]
train_cfg = dict(max_iters=iterations, val_interval=16000 * accumulate)
