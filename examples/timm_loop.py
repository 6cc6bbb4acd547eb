"""ferkd in timm's training pieces: its optimizers, scheduler, moving average and gradient clipping around our crops and loss.

python examples/timm_loop.py --data photos --labels labels --model vit_small_patch16_224
"""

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad

from ferkd import CropLoader, RegionPolicy, ferkd_loss
from ferkd.mixing import MixedRows, Mixing, mix_pixels

parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--labels", required=True)
parser.add_argument("--model", default="vit_small_patch16_224")
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--epochs", type=float, default=100.0)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--clip-grad", type=float, default=1.0)
parser.add_argument("--mix", default="none", choices=["none", "mixup", "cutmix", "mixup_cutmix", "selfmix"])
parser.add_argument("--out", default="student.pth")
args = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
policy = RegionPolicy(discard_below=0.1, calibrate_below=0.3)
config = timm.data.resolve_data_config({}, model=timm.create_model(args.model))
loader = CropLoader(args.data, args.labels, size=config["input_size"][-1], interpolation=config["interpolation"],
                    batch_size=args.batch_size, epochs=args.epochs, policy=policy)  # fmt: skip
mixing = Mixing(args.mix)
model = timm.create_model(args.model, num_classes=loader.store.classes).to(device)
mean, std = (torch.tensor(config[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=0.05, filter_bias_and_bn=True)
scheduler = CosineLRScheduler(optimizer, t_initial=len(loader), warmup_t=len(loader) // 20, warmup_lr_init=args.lr / 100, t_in_epochs=False)
ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
losses = AverageMeter()

for step, batch in enumerate(loader):
    images = (batch.pixels.to(device, non_blocking=True).float() / 255 - mean) / std
    mixed = loader.draw_mixing(step, mixing)  # on the CPU, keyed by (seed, step)
    if mixed is not None:
        mixed = MixedRows(*(column.to(device, non_blocking=True) for column in mixed))
        images = mix_pixels(images, mixed)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(images)
    target = batch.target.to(device, non_blocking=True)
    mix = None if mixed is None else (mixed.partner, mixed.lam)
    loss, stats = ferkd_loss(logits, loader.records(batch, device), target, policy=policy, mix=mix, stats=True)
    optimizer.zero_grad()
    loss.backward()
    dispatch_clip_grad(model.parameters(), args.clip_grad)
    optimizer.step()
    scheduler.step_update(step + 1)
    ema.update(model, step)
    if step % 50 == 0 or step == len(loader) - 1:
        losses.update(loss.item())
        print(f"step {step + 1}/{len(loader)}  loss {losses.val:.4f} ({losses.avg:.4f})  right {stats.correct.float().mean().item():.1%}")
torch.save(ema.module.state_dict(), args.out)  # timm.create_model(..., checkpoint_path=...) loads it
