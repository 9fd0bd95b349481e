"""What one call of ``amsdn evaluate`` will do, and what that will cost: a recipe's own suite, or a fixed protocol with its checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from amsdn.attacks import Attack
from amsdn.commands.measuring import Measured, measure
from amsdn.errors import InputError
from amsdn.evaluation.cost import planned_seconds
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.protocol import Protocol
from amsdn.evaluation.reliability.diagnosis import diagnose
from amsdn.evaluation.shards import WHOLE, Shard
from amsdn.evaluation.time_left import duration
from amsdn.protocols import is_black_box


@dataclass(frozen=True)
class Plan:
    """Attacks by name, how many test images they meet, and with which seed; ``protocol`` where all of this is one's."""

    attacks: Mapping[str, Attack]
    config: EvaluateConfig
    samples: int | None
    headline: Mapping[str, float]
    protocol: Protocol | None = None
    planned: Mapping[str, float] = field(default_factory=dict)  # seconds an image and attack
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # the same of the protocol's checks, by threat

    @classmethod
    def of_protocol(cls, protocol: Protocol, run: Measured) -> "Plan":
        """The protocol on this model and data, its cost measured."""

        def priced(found: Mapping[str, Attack]) -> dict[str, float]:
            return planned_seconds(run.model, run.dataset.test, found, protocol.config.batch_size)

        hidden = is_black_box(run.model)
        attacks = protocol.black_box() if hidden else protocol.attacks(run.model)
        checks = {} if hidden else {threat: priced(d.attacks()) for threat, d in protocol.diagnoses().items()}
        return cls(attacks, protocol.config, protocol.effort.samples, protocol.headline, protocol, priced(attacks), checks)

    def announcement(self, run: Measured) -> str:
        """One line for people: what a protocol is about to do, and for how long at most."""
        assert self.protocol is not None
        images = min(self.samples or len(run.dataset.test), len(run.dataset.test))
        checked = min(self.protocol.effort.checked, images)
        own = sum(self.planned.values()) * images
        checks = sum(sum(seconds.values()) for seconds in self.checks.values()) * checked
        return (
            f"protocol {self.protocol.name}, version {self.protocol.version}: {len(self.attacks)} attacks on {images} test images of "
            f"{run.dataset.name}, then checks on {checked} of them; at most {duration(own + checks)} here, if every image resists everything"
        )

    def carry_out(self, run: Measured, shard: Shard = WHOLE, *, progress: bool = True) -> None:
        """Attack, and where a protocol is followed and this is the whole, check what came out."""
        records = measure(
            run,
            self.attacks,
            self.config,
            self.samples,
            self.headline,
            shard=shard,
            progress=progress,
            protocol=self.protocol,
            planned=self.planned,
        )
        if self.protocol is not None and shard.whole:
            diagnose(
                run.model,
                run.dataset.test,
                run.out,
                self.protocol.diagnoses(),
                self.protocol.effort.checked,
                records=records,
                planned=self.checks,
                progress=progress,
            )


def refuse_changes(protocol: str, changed: Mapping[str, bool]) -> None:
    """Raise InputError naming the first option that a protocol fixes and that was given all the same."""
    given = [flag for flag, value in changed.items() if value]
    if given:
        raise InputError(f"--protocol {protocol} fixes what {given[0]} says; leave out one of the two")
