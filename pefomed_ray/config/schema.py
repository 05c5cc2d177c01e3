"""Every setting of a run: its meaning, unit, default and where the default comes from. Nothing else holds a default.

Values marked *paper* are those of PeFoMed (arXiv 2401.02797, section 4.1 and the published configuration files).
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Precision(Section):
    """What a frozen base is held in."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its weights; what is trained is float32 either way."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """nf4 (QLoRA, arXiv 2305.14314) or int8 (arXiv 2208.07339) for the linear layers of the language model, by
    bitsandbytes; all else is held in `dtype`. int8 needs a GPU, and one worker."""


class BaseModelConfig(Precision):
    """The frozen model an adapter is trained on."""

    path: str = "embedded"
    """`embedded`, the tiny base in the package, or the folder of a base model."""


def _names(value: Any) -> Any:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if value in (["all"], ("all",)):  # as LLaMA-Factory spells it
        return ("all-linear",)
    return value


class LoraConfig(Section):
    """Low-rank adapters on the language model; never on the tower."""

    rank: PositiveInt = 64
    """r, *paper*."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank, *paper*."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732): large ranks then learn as fast as small ones."""
    use_dora: bool = False
    """Learn the length of each weight's rows apart from their direction (DoRA, arXiv 2402.09353)."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """Learning rate of the B matrices over that of all else (LoRA+, arXiv 2402.12354; 16 there). None: the same."""
    dropout: Fraction = 0.05
    """Dropout before the down projection, *paper*."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = ("q_proj", "v_proj")
    """Names of linear layers of the language model, or `all-linear` for all of them; *paper*: query and value."""


class ProjectorConfig(Section):
    """The linear layer from patch features to visual tokens."""

    train: bool = True
    """Trained together with the adapters, *paper*."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule: linear warm-up to the peak, cosine to the minimum, both really reached."""

    learning_rate: PositiveFloat = 1e-5
    """Peak, *paper* (stage 1 and VQA)."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Last step's, *paper*."""
    warmup_start_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """First step's, *paper*."""
    warmup_fraction: Fraction = 0.03
    """Share of all steps spent warming up. Ours: the published schedule warms up for exactly one epoch and so never
    reaches its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """On matrices; biases and norms have none, *paper*."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """*paper*."""
    max_grad_norm: PositiveFloat = 1.0
    """Global norm the gradient is clipped to. Ours: the published loop does not clip."""

    @model_validator(mode="after")
    def _ends_are_below_the_peak(self) -> "OptimizerConfig":
        for name in ("min_learning_rate", "warmup_start_learning_rate"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(f"{name} {getattr(self, name)} is above learning_rate {self.learning_rate}")
        return self


class MixturePart(Section):
    """One corpus of a mixture."""

    shards: str
    """Folder or `s3://` URL written by `pefomed-ray data prepare`."""
    weight: PositiveFloat = 1.0
    """Share of every epoch, relative to the other parts' weights and whatever the corpus's size."""


def _one_part(value: Any) -> Any:
    if isinstance(value, str):
        return [{"shards": value}]
    if isinstance(value, list | tuple) and value:
        return value
    raise ValueError("give a folder of shards, or a list such as [{shards: FOLDER, weight: 0.7}, {shards: OTHER}]")


class DataConfig(Section):
    """What is learnt from."""

    shards: Annotated[tuple[MixturePart, ...], BeforeValidator(_one_part)]
    """Folder or `s3://` URL written by `pefomed-ray data prepare`; or several, each with its weight: stage 1 of the
    paper mixes ROCO, ImageCLEF, MedICaT and MIMIC-CXR. An epoch then has as many rows as all of them together."""
    feature_cache: str | None = None
    """Folder written by `pefomed-ray data cache`: images come as the tower's stored features, the tower never runs."""
    max_answer_tokens: PositiveInt = 256
    """Longer answers are cut, without an end token; how many is reported. IU-Xray's 95th percentile is 58 words."""


class TrainingConfig(Section):
    """How long and in which portions."""

    epochs: PositiveInt = 5
    """Passes over the training split."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, however many epochs that is."""
    batch_size: PositiveInt = 16
    """Rows an optimizer step, over all workers."""
    micro_batch_size: PositiveInt = 8
    """Rows a forward pass of one worker. batch_size must be a multiple of workers x micro_batch_size. Halved, with as
    many more passes, where it does not fit into memory."""
    group_by_length: bool = False
    """Let a step's rows have texts of like length, so that less padding is computed. Rows still come in random order,
    but a step sees short texts or long ones, and of a mixture perhaps one corpus."""
    gradient_checkpointing: bool = False
    """Recompute the language model's layers in the backward pass: about a third more time for far less memory."""
    checkpoint_steps: PositiveInt = 100
    """Optimizer steps between checkpoints, which a run that is interrupted continues from; one also ends each epoch."""
    max_bad_steps: Annotated[int, Field(ge=0)] = 0
    """Steps that may be left out because loss or gradient is not finite, before the run stops."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many epochs without a better validation metric."""


class ValidationConfig(Section):
    """The metric that search and early choices look at: generated answers against references, every epoch."""

    rows: PositiveInt = 256
    """The first rows of the (shuffled) validation split."""
    metric: Literal["exact_match", "rougeL"] = "exact_match"
    max_new_tokens: PositiveInt = 32
    batch_size: PositiveInt = 64
    """Rows generated at once."""


class ResourcesConfig(Section):
    """What of the cluster a run takes."""

    workers: PositiveInt = 1
    """Ranks of data and FSDP2 parallelism; one needs neither."""
    min_workers: PositiveInt | None = None
    """Where nodes come and go: the run starts and goes on with as many workers as there is room for, from this number
    to `workers`, each time from the newest checkpoint. None: always `workers`."""
    use_gpu: bool = False
    """One GPU a worker; without, `cpus_per_worker`."""
    cpus_per_worker: PositiveFloat = 0.5
    """CPUs a worker reserves where use_gpu is false (its number of threads is this, rounded up)."""
    data_workers: PositiveInt = 1
    """Processes that decode and render for all workers together, half a CPU reserved each."""
    strategy: Literal["auto", "fsdp", "ddp"] = "auto"
    """fsdp: every worker holds a part of the base and gathers layer by layer. ddp: every worker holds all of it, and
    only gradients of what learns travel: for the paper's model in bfloat16 64 times fewer bytes, with n micro-batches a
    step n times as many fewer. auto: ddp where the base takes at most half of a worker's device."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients travel in between workers; bfloat16 halves their bytes and rounds them to eight bits."""
    cpu_offload: bool = False
    """Under FSDP2 on GPUs: a worker's part of the weights stays in the CPU's memory, as do gradients and AdamW's
    moments; a GPU holds one block at a time. For bases that fit no other way: in each step all passes over the bus."""
    collective_timeout_s: PositiveFloat = 300.0
    """A worker that waits longer for the others gives up, and all start again from the last checkpoint. Ray's own
    default is 30 minutes."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that workers are started again after one was lost, before the run stops."""
    max_preemptions: Annotated[int, Field(ge=0)] = 20
    """The same for nodes that were taken away with notice. Ray's own default has no end."""

    @property
    def fewest_workers(self) -> int:
        """That the run goes on with."""
        return self.min_workers or self.workers

    @property
    def lanes(self) -> int:
        """Slices of each global batch that are dealt out to the workers: equally many to each, whatever their number.

        The least number that all from `fewest_workers` to `workers` divide.
        """
        return math.lcm(*range(self.fewest_workers, self.workers + 1))

    @model_validator(mode="after")
    def _no_more_at_least_than_at_most(self) -> "ResourcesConfig":
        if self.fewest_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self


def _trackers(value: Any) -> Any:
    if value is None:  # as YAML's null
        return ()
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple):
        return value
    # TensorBoard's events are always written.
    return tuple(name for i, name in enumerate(value) if name not in ("none", "tensorboard", *value[:i]))


class TrainConfig(Section):
    """One training run: `pefomed-ray train CONFIG.yaml`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: Literal["caption", "vqa", "report"]
    output_dir: str | None = None
    """Everything the run writes; default `runs/<name>`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """*paper*."""
    template: str = "paper"
    """Wording of prompts, by name; the embedded base was trained with `short`."""
    init_from: str | None = None
    """An adapter bundle whose weights the run starts from: stage 2 from stage 1."""
    report_to: Annotated[tuple[Literal["mlflow", "wandb"], ...], BeforeValidator(_trackers)] = ()
    """Trackers that get the run's numbers and config beside TensorBoard's events, which are always written; a name,
    several with commas between, or a list. Where they are and who may write there, the environment says."""
    base: BaseModelConfig = BaseModelConfig()
    lora: LoraConfig = LoraConfig()
    projector: ProjectorConfig = ProjectorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "TrainConfig":
        rows = self.resources.lanes * self.training.micro_batch_size
        if self.training.batch_size % rows:
            workers = "resources.workers"
            if self.resources.lanes != self.resources.workers:
                workers = f"{self.resources.lanes} (what all numbers of resources.workers divide)"
            raise ValueError(
                f"training.batch_size {self.training.batch_size} is not a multiple of {workers} x "
                f"training.micro_batch_size = {rows}"
            )
        return self

    @model_validator(mode="after")
    def _offloading_has_what_it_needs(self) -> "TrainConfig":
        resources = self.resources
        if not resources.cpu_offload:
            return self
        needs = {
            "use_gpu=true: without a GPU the weights are in the CPU's memory already": resources.use_gpu,
            "strategy fsdp or auto: under ddp every worker's device holds the whole base": resources.strategy != "ddp",
            "workers (or min_workers) of two or more: one alone does not shard": resources.fewest_workers > 1,
        }
        for need, is_met in needs.items():
            if not is_met:
                raise ValueError(f"resources.cpu_offload needs resources.{need}")
        if self.base.quantization != "none":
            raise ValueError(
                f"resources.cpu_offload is not for a base in {self.base.quantization}, whose scales would stay behind; "
                "take base.dtype=bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _a_quantised_base_has_what_it_needs(self) -> "TrainConfig":
        quantization = self.base.quantization
        if quantization == "int8" and not self.resources.use_gpu:
            raise ValueError("base.quantization int8 needs resources.use_gpu=true; on CPUs take nf4")
        if quantization == "int8" and self.resources.workers > 1:
            raise ValueError(
                f"base.quantization int8 runs on one worker, not {self.resources.workers}: its weights cannot be "
                "sharded (they lose their scales); take nf4, or resources.workers=1"
            )
        return self


class FeatureCacheConfig(Section):
    """A feature cache: `pefomed-ray data cache SHARDS OUTPUT`."""

    base: str = "embedded"
    """The base whose tower runs."""
    template: str = "short"
    """Of the runs that will use the cache."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """What features are stored in; bfloat16 reaches further and is eight times coarser."""
    splits: tuple[Literal["train", "validation", "test"], ...] | None = None
    """Default: all that have rows."""
    workers: PositiveInt = 1
    """Processes that run the tower."""
    use_gpu: bool = False
    """One GPU a worker."""
    cpus_per_worker: PositiveFloat = 0.5
    """What a worker reserves; its threads are this, rounded up."""
    batch_size: PositiveInt = 32
    """Images the tower sees at once."""
    limit_gb: PositiveFloat = 20.0
    """A larger cache is made only after a question, or with `--yes`."""


class _Dimension(Section):
    """What is searched of one key."""

    times: str | None = None
    """Another key of the space that what is drawn is multiplied by: `lora.alpha: {times: lora.rank, choice: [1, 2]}`
    draws alpha / rank."""


class Choice(_Dimension):
    """One of some values."""

    choice: Annotated[tuple[int | float | str, ...], Field(min_length=1)]


class Uniform(_Dimension):
    """A number between two, evenly."""

    uniform: tuple[float, float]


class LogUniform(_Dimension):
    """A number between two, evenly in its logarithm."""

    loguniform: tuple[PositiveFloat, PositiveFloat]


class Integer(_Dimension):
    """A whole number between two, both included."""

    int: tuple[int, int]


Dimension = Choice | Uniform | LogUniform | Integer


class AshaConfig(Section):
    """Asynchronous successive halving over epochs (arXiv 1810.05934)."""

    grace_period_epochs: PositiveInt = 1
    """No trial is stopped before."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """The best 1/reduction_factor of a rung go on."""


class TpeConfig(Section):
    """Tree-structured Parzen estimator, which proposes trials (arXiv 2304.11127); Optuna's names."""

    n_startup_trials: Annotated[int, Field(ge=0)] = 10
    """Trials that end before it proposes; until then they are drawn at random. Optuna's default."""
    multivariate: bool = True
    """Draw the parameters together, not each for itself: a good learning rate depends on rank and alpha."""
    constant_liar: bool = True
    """Take trials that still run for bad ones, so that trials side by side do not crowd one spot. Optuna's default."""


class JudgeConfig(Section):
    """A language model as judge: `pefomed-ray judge PREDICTIONS.jsonl model=NAME`.

    The key of the endpoint is none of these settings: it comes from a variable of the environment, or from a file.
    """

    model: Annotated[str, Field(min_length=1)]
    """The model to ask for; best a dated name, such as its maker gives, since one without a date changes."""
    base_url: str = "https://api.openai.com/v1"
    """Any endpoint that speaks OpenAI's chat completions, up to and with `/v1`."""
    key_env: str = "OPENAI_API_KEY"
    """Variable of the environment that holds the key; the one that the `openai` package reads."""
    key_file: str | None = None
    """File that holds the key instead, such as `client.key` in the registry of an endpoint of our own."""
    local: bool = False
    """Declares that the endpoint runs on machines that the data's licence covers. Restricted data go nowhere else."""
    licence: Literal["open", "restricted"] | None = None
    """Of the data, where the predictions do not say; what nobody declares open counts as restricted."""
    repeats: PositiveInt = 1
    """Verdicts on each answer; three show how far the judge agrees with itself."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0: as repeatable as the endpoint can be."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of the sample and of the canaries' rows; a repeat asks with this plus its number, where the endpoint knows it."""
    max_tokens: PositiveInt = 256
    """Of a reply. A verdict takes ten; a model that thinks first may need thousands."""
    sample: PositiveInt | None = None
    """Judge only so many rows, drawn by `seed`. Default: all."""
    canaries: Annotated[int, Field(ge=0)] = 3
    """Rows whose answer is also replaced by each canary: by nothing, by the reference, by an instruction, ... ."""
    blank_image: bool = False
    """Send a grey picture along, for an endpoint that answers no question without one."""
    concurrency: PositiveInt = 8
    """Questions on their way at once."""
    requests_per_minute: PositiveFloat | None = None
    """Evenly spaced. Default: as fast as the endpoint answers."""
    tokens_per_minute: PositiveFloat | None = None
    """Counted as they are reserved: those of the question, estimated, and `max_tokens`."""
    timeout_s: PositiveFloat = 60.0
    """For a whole reply."""
    max_retries: Annotated[int, Field(ge=0)] = 4
    """Of one question: after 408, 409, 429, 5xx, a lost connection, a timeout, a body that is no completion."""
    price_in_usd: Annotated[float, Field(ge=0)] | None = None
    """Per million tokens of questions, from the maker's price list; with `batch` the price of batches."""
    price_out_usd: Annotated[float, Field(ge=0)] | None = None
    """Per million tokens of replies."""
    limit_usd: Annotated[float, Field(ge=0)] = 5.0
    """A run that may cost more is started only after a question, or with `--yes`; without prices an endpoint that is
    not local always is."""
    cap_usd: PositiveFloat | None = None
    """Nothing more is asked once so much is spent, cached answers included; the rest of the rows stays unscored. What
    is on its way then is still paid."""
    max_calls: PositiveInt | None = None
    """Nothing more is asked after so many requests of this run, retries included."""
    cache: str | None = None
    """SQLite file of replies, which may be shared by several outputs. Default: `cache.sqlite` in the output."""
    batch: bool = False
    """Send the rows as one job of the Batch API: about half the price, within a day."""
    batch_wait_s: PositiveFloat = 86400.0
    """How long to wait for that job; the same command goes on waiting for it."""

    @model_validator(mode="after")
    def _a_cap_has_prices(self) -> "JudgeConfig":
        if (self.price_in_usd is None) != (self.price_out_usd is None):
            raise ValueError("price_in_usd and price_out_usd: give both, 0 where it costs nothing, or none")
        if self.cap_usd is not None and self.price_in_usd is None:
            raise ValueError("cap_usd needs price_in_usd and price_out_usd")
        return self


class WinnerConfig(Section):
    """How the best of a search is chosen, once its trials have ended."""

    rescore: PositiveInt = 3
    """The best so many trials answer the whole validation split; the best of them there wins."""
    retrain: bool = False
    """Train the winner's config once more, into `<output_dir>/best`, rather than take the trial's own bundle."""
    judge: JudgeConfig | None = None
    """Let a language model decide among the re-scored trials: it sees `sample` of their answers, the same rows of each;
    `cap_usd` and `max_calls` are for all of them together. Default: the metric decides."""


class SearchConfig(Section):
    """One search: `pefomed-ray search search_spaces/SPACE.yaml`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Also the study's, in `storage`."""
    preset: str
    """The training config every trial starts from; relative to the search space's own folder."""
    output_dir: str | None = None
    """Default `runs/<name>`."""
    overrides: dict[str, bool | int | float | str] = {}
    """Dotted keys of the preset set for every trial; `training.epochs` is how long one may take."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dotted key of the training config -> what to try."""
    points: tuple[dict[str, int | float | str], ...] = ()
    """Known points, tried first; what they leave out is drawn."""
    trials: PositiveInt = 8
    """Trials in all; those that fail count."""
    time_budget_s: PositiveFloat | None = None
    """Trials are left where they stand after so many seconds; `--resume` goes on with them, for as long again."""
    plateau_trials: PositiveInt | None = None
    """Begin no other trial once so many, the newest that ended, have brought no better one."""
    packing: Literal["auto", "on", "off"] = "auto"
    """on: trials share open bases, many adapters trained in one pass (PLoRA, arXiv 2508.02932), and the result is that
    of each trial alone; they may differ in `lora` and `optimizer` only. auto: where that can be. off: each trial by
    itself."""
    max_concurrent: PositiveInt | None = None
    """Trials at once. Default: of trials by themselves as many as the cluster holds, with their data workers; of packed
    ones `packed_at_once`."""
    metric: Literal["exact_match", "rougeL"] = "exact_match"
    """Of the validation rows, in a trial's best epoch; larger is better."""
    scheduler: Literal["asha", "none"] = "asha"
    """none: every trial runs to its end."""
    asha: AshaConfig = AshaConfig()
    sampler: TpeConfig = TpeConfig()
    choice: WinnerConfig = WinnerConfig()
    storage: str | None = None
    """Where Optuna keeps the study: a database's URL, such as `postgresql://user@host/optuna`. Default: SQLite,
    `<output_dir>/study.db`, which wants a disk with working locks: not NFS."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of what is drawn; the trials' own is the preset's."""

    @property
    def packed_at_once(self) -> int:
        """Packed trials that run side by side: half of all, so that what the first half showed is known when the second
        is drawn; but as many as are drawn at random in any case."""
        default = max(-(-self.trials // 2), self.sampler.n_startup_trials)
        return min(self.max_concurrent or default, self.trials)

    @model_validator(mode="after")
    def _ranges_have_a_lower_and_an_upper_end(self) -> "SearchConfig":
        for key, dimension in self.space.items():
            for form, value in dimension.model_dump(exclude={"times"}).items():
                if form != "choice" and value[0] >= value[1]:
                    raise ValueError(f"space.{key}: {form} {list(value)} must be [lower, upper]")
        return self

    @model_validator(mode="after")
    def _factors_multiply_something_drawn(self) -> "SearchConfig":
        for key, dimension in self.space.items():
            other = self.space.get(dimension.times) if dimension.times else None
            if dimension.times and (other is None or other.times or other is dimension):
                free = [name for name, found in self.space.items() if not found.times]
                raise ValueError(
                    f"space.{key}: times {dimension.times!r} is not another key of space that is drawn by itself "
                    f"({', '.join(free) or 'there is none'})"
                )
        return self


class ServeConfig(Section):
    """The endpoint: `pefomed-ray serve`."""

    host: str = "127.0.0.1"
    """Interface to listen on. Loopback: the endpoint speaks plain HTTP."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    tls_in_front: bool = False
    """Says that a TLS proxy stands in front; without, only loopback is listened on."""
    replicas: PositiveInt = 1
    """Two survive the loss of one; each holds the base once."""
    max_replicas: PositiveInt | None = None
    """Ray Serve adds replicas up to here while requests queue, and takes them away again; None: always `replicas`."""
    use_gpu: bool = False
    """A GPU for a replica; without, one CPU."""
    gpus_per_replica: PositiveFloat = 1.0
    """A fraction lets several replicas share one."""
    engine: Literal["pefomed", "vllm"] = "pefomed"
    """`vllm`: Ray Serve's own LLM support, for bases of the Hugging Face families and where it is installed."""
    max_batch_size: PositiveInt = 16
    """Requests that a replica answers at once, whatever their adapters; each step of theirs is one forward pass."""
    max_adapters: PositiveInt = 8
    """Adapters a replica keeps in memory; the one that was not asked for longest makes room."""
    max_rank: PositiveInt = 64
    """An adapter of a higher rank is refused: memory is set aside for as many adapters of this one."""
    image_cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """What the vision tower made of images that were seen last, a replica."""
    max_ongoing_requests: PositiveInt = 32
    """A replica holds at most so many."""
    max_queued_requests: PositiveInt = 64
    """Beyond, requests are answered 429 at once."""
    request_timeout_s: PositiveFloat = 60.0
    """From a request's headers to the last of its answer; a body or an answer that takes longer is cut off."""
    drain_timeout_s: PositiveFloat = 30.0
    """How long a replica that is taken away may go on with what it has."""
    refresh_s: PositiveFloat = 1.0
    """Seconds between two looks at the registry; a moved alias is followed at the next one without being told."""
    max_new_tokens: PositiveInt = 256
    """Upper bound of a request's max_tokens, and its default."""
    max_images: PositiveInt = 4
    max_body_bytes: PositiveInt = 16 << 20
    show_api: bool = False
    """Whether /openapi.json answers, behind the key like all else."""
