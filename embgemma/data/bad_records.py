"""What becomes of a record that cannot be used."""

import dataclasses

from embgemma.errors import DataError, EmptyTextError

BAD_RECORD_POLICIES = ("fail", "skip")
# A run that skips names this many records; the rest are counted.
MAX_LISTED_SKIPS = 20


@dataclasses.dataclass
class SkipLog:
  """Records left out: bad ones under `on_bad_record=skip`, and sound ones of no use.

  Attributes:
    count: Bad records.
    empty: Those of them whose text is empty.
    listed: What is wrong with the first of them.
    unused: Sound records that give no example, such as sentence pairs without a gold
      label: their number by reason.
  """

  count: int = 0
  empty: int = 0
  listed: list[str] = dataclasses.field(default_factory=list)
  unused: dict[str, int] = dataclasses.field(default_factory=dict)

  def add(self, error: DataError) -> None:
    self.count += 1
    self.empty += isinstance(error, EmptyTextError)
    if len(self.listed) < MAX_LISTED_SKIPS:
      self.listed.append(str(error))

  def add_unused(self, reason: str) -> None:
    self.unused[reason] = self.unused.get(reason, 0) + 1


def leave_out(error: DataError, on_bad_record: str, skipped: SkipLog) -> None:
  """Counts a bad record where the policy is "skip".

  Raises:
    DataError: the policy is "fail".
  """
  if on_bad_record != "skip":
    raise DataError(
      f"{error} (or pass --on_bad_record=skip to leave bad records out)"
    ) from error
  skipped.add(error)
