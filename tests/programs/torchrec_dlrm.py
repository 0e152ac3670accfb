"""torchrec's DLRM, its dense part and its tables, with its GradientClippingOptimizer, in one
process."""

import recorded  # first

# isort: split
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import KeyedOptimizerWrapper

tables = [
    EmbeddingBagConfig(name=f"t{i}", embedding_dim=8, num_embeddings=50, feature_names=[f"f{i}"])
    for i in range(3)
]
model = DLRMTrain(
    DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables),
        dense_in_features=4,
        dense_arch_layer_sizes=[16, 8],
        over_arch_layer_sizes=[16, 1],
    )
)
optimizer = KeyedOptimizerWrapper(
    dict(model.named_parameters()), lambda params: torch.optim.SGD(params, lr=0.5)
)
if recorded.DISTCLIP:
    import distclip  # distclip

    clipper = distclip.GradClipper(model, max_norm=0.05)  # distclip
else:
    optimizer = GradientClippingOptimizer(
        optimizer, GradientClipping.NORM, max_gradient=0.05
    )  # own

source = torch.Generator().manual_seed(1)
losses = []
for _ in range(recorded.STEPS):
    dense = torch.randn(16, 4, generator=source)
    values = torch.randint(50, (48,), generator=source)
    sparse = KeyedJaggedTensor.from_lengths_sync(
        keys=["f0", "f1", "f2"], values=values, lengths=torch.ones(48, dtype=torch.int64)
    )
    labels = (dense[:, 0] > 0).float()
    optimizer.zero_grad()
    loss, _ = model(Batch(dense, sparse, labels))
    loss.backward()
    if recorded.DISTCLIP:
        clipper.step(optimizer)  # distclip
    else:
        optimizer.step()  # own
    losses.append(loss.detach())
recorded.tell(losses)
