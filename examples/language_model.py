"""The fused loss alone, with sparse labels of your own: a small language model that learns a larger one's 32 most probable next tokens.

    python examples/language_model.py --vocabulary 128256

Nothing here is about images. A position is a row; `ids` and `probs` are what a teacher was once asked for and stored; the rest of its
probability is the tail, spread evenly over the vocabulary ("smooth") or divided away ("renorm"). No [positions, vocabulary] target exists.
Positions that must not count (padding) are discarded by a probability of 0 under discard_below, and the mean leaves them out.
"""

import argparse

import torch
from torch import nn

from ferkd import RegionPolicy, ferkd_loss

parser = argparse.ArgumentParser()
parser.add_argument("--vocabulary", type=int, default=32_000)
parser.add_argument("--positions", type=int, default=64, help="of a sequence")
parser.add_argument("--batch-size", type=int, default=4, help="sequences")
parser.add_argument("--topk", type=int, default=32)
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
rows, width = args.batch_size * args.positions, 64
tokens = torch.randint(args.vocabulary, (args.batch_size, args.positions), device=device)
ids = torch.stack([torch.randperm(args.vocabulary)[: args.topk] for _ in range(rows)]).to(device)  # the teacher's stored answers
probs = torch.softmax(torch.randn(rows, args.topk, device=device).sort(descending=True).values * 2, 1) * 0.95
is_padding = torch.arange(rows, device=device) % args.positions >= args.positions - 8
probs[is_padding] = 0.0

model = nn.Sequential(nn.Embedding(args.vocabulary, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, args.vocabulary)).to(
    device
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
policy = RegionPolicy(discard_below=1e-6)
truth = tokens.roll(-1, 1).flatten()  # only confidence "target" and calibration would look at it
for step in range(args.steps):
    logits = model(tokens).flatten(0, 1)
    loss = ferkd_loss(logits, (ids, probs), truth, policy=policy, temperature=1.0, tail="smooth")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}")
