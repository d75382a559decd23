"""Every metric of ours: its name, what it says, its labels and buckets.

Labels are bounded: a model's name is used once the model was in memory, never because a client has
typed it, and of more than MAX_MODELS models the later ones are "other".
"""

from __future__ import annotations

from bisect import bisect_left

from sdbento.errors import OK, OUTCOMES
from sdbento.metrics.instruments import Counter, Gauge, Histogram, Instrument, Label

MAX_MODELS = 32
NONE = "none"  # the model of requests that ended before they had one

# A size is the side of the smallest of these squares that has no fewer pixels than the image.
SIDES = (256, 512, 768, 1024, 1536, 2048)
LARGER = "larger"

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
QUEUE_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
LOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

route = Label("route")  # the doors say which there are
model = Label("model", room=MAX_MODELS)
model_or_none = Label("model", (NONE,), room=MAX_MODELS)
size = Label("size", (*map(str, SIDES), LARGER))

requests_total = Counter(
    "sdbento_requests_total",
    "Requests for images that have ended, jobs included; `model` is `none` if they ended before a "
    "model was ready for them",
    route,
    model_or_none,
    Label("outcome", OUTCOMES),
)
images_total = Counter(
    "sdbento_images_total",
    "Images that were made",
    model,
    Label("task", ("txt2img", "img2img", "inpaint", "upscale")),
)
request_seconds = Histogram(
    "sdbento_request_seconds",
    "Seconds from a request's arrival, or from when its job was taken up, to its end",
    bounds=REQUEST_SECONDS,
)
queue_seconds = Histogram(
    "sdbento_queue_seconds",
    "Of these, seconds until its first step: for its models, its images and its turn; of requests "
    "whose images were made",
    bounds=QUEUE_SECONDS,
)
queue_depth = Gauge(
    "sdbento_queue_depth", "Requests that wait: unfinished ones beyond MAX_BATCH_SIZE"
)
active_images = Gauge(
    "sdbento_active_images", "Images that the engine has taken in and not finished"
)
step_seconds = Histogram(
    "sdbento_step_seconds",
    "Seconds of a UNet call, by the side of the square with as many pixels as its images",
    model,
    size,
    bounds=STEP_SECONDS,
)
step_rows = Histogram(
    "sdbento_step_rows",
    "Rows of a UNet call: two for each image with guidance, one without",
    bounds=ROWS,
)
rows_total = Counter(
    "sdbento_rows_total",
    "Rows that UNet calls have computed: of images, and those that pad a CUDA graph",
    Label("kind", ("useful", "padding")),
)
decode_seconds = Histogram(
    "sdbento_decode_seconds", "Seconds of a VAE call that decodes images", bounds=STEP_SECONDS
)
out_of_memory_total = Counter(
    "sdbento_out_of_memory_total",
    "Calls and loads for which the device had too little memory; most were made again, smaller",
)
cancelled_total = Counter(
    "sdbento_cancelled_total",
    "Requests that ended before their images were made: the client left, /cancel, /purge-queue, or "
    "AUTOMATIC1111's interrupt",
    Label("reason", ("disconnect", "cancel", "purge", "interrupt")),
)
model_loads_total = Counter(
    "sdbento_model_loads_total",
    "Loads of models and ControlNets; `restored` from the host's memory, where a GPU had no room",
    Label("outcome", (OK, "restored", "failed")),
)
model_load_seconds = Histogram(
    "sdbento_model_load_seconds",
    "Seconds of a load that succeeded; downloads are no part of it",
    bounds=LOAD_SECONDS,
)
evictions_total = Counter(
    "sdbento_evictions_total", "Models and ControlNets that had to make room for others"
)
resident_models = Gauge("sdbento_resident_models", "Models and ControlNets in memory")
memory_bytes = Gauge(
    "sdbento_memory_bytes",
    "Bytes of models in memory, of what they may take together, of models that wait in the host's "
    "memory, and, on a GPU, of all that the process holds there",
    Label("kind", ("models", "budget", "offloaded"), room=1),
)
lora_loads_total = Counter("sdbento_lora_loads_total", "LoRAs that were read into memory")
prompt_cache_total = Counter(
    "sdbento_prompt_cache_total",
    "Prompts that had been encoded before, or had not",
    Label("result", ("hit", "miss")),
)
jobs = Gauge(
    "sdbento_jobs",
    "Jobs that the store keeps, of everybody",
    Label("status", ("IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")),
)
webhooks_total = Counter(
    "sdbento_webhooks_total",
    "Posts to webhooks: accepted by their host, refused by it, or not answered",
    Label("outcome", ("accepted", "refused", "unanswered")),
)
uploads_total = Counter(
    "sdbento_uploads_total", "Images sent to buckets", Label("outcome", (OK, "failed"))
)

METRICS = {one.name: one for one in [*vars().values()] if isinstance(one, Instrument)}


def expect_model(name: str) -> None:
    """A model is in use: what is counted for it begins at 0."""
    model.bounded(name)
    model_or_none.bounded(name)


def size_of(pixels: int) -> str:
    """The value of `size` for images of so many pixels."""
    return size.values[bisect_left(_PIXELS, pixels)]


_PIXELS = [side**2 for side in SIDES]
