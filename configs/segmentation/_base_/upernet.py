# UperNet on an MAE-pre-trained ViT, as in BEiT's and the MAE paper's (A.4) transfer to ADE20K.
# A leaf config adds what depends on the data and the encoder's size: num_classes, in_channels, channels, test_cfg.
trunk = None  # timm:NAME: any plain ViT of timm, with its weights; its patch size and width are taken over
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        # None: train_net.py fills in those of the weights file or, from scratch, of the training images
        mean=None,
        std=None,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        test_cfg=dict(size_divisor=32),  # whole cells of the coarsest map; a leaf with other patches sets its own
    ),
    # BEiT's relative positions, from zero, and a trainable LayerScale from 1: both are added in transfer alone
    backbone=dict(
        type="MAECoreViT",
        trunk=trunk,
        drop_path=0.1,
        relative_positions="none" if trunk else "table",
        layer_scale=None if trunk else 1.0,
    ),
    neck=dict(type="Feature2Pyramid", rescales=[4, 2, 1, 0.5], norm_cfg=dict(type="SyncBN", requires_grad=True)),
    decode_head=dict(
        type="UPerHead",
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
)
