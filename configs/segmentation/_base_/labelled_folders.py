# Folders of your own label maps, images/{training,validation} beside annotations/{training,validation}, and the
# optimizer; the same for every config that reads them. A leaf config adds what depends on the data and on the encoder.
train_dataloader = dict(
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="LabelledFolder",
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    ),
)
val_dataloader = dict(
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="LabelledFolder",
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(
    type="AmpOptimWrapper",  # train_net.py trains in fp32 where there is no GPU
    dtype="bfloat16",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.05),
    constructor="MAECoreLayerDecay",
    paramwise_cfg=dict(paper_bug=False),
)
train_cfg = dict(type="IterBasedTrainLoop")
