"""What a prompt template is: data, named and versioned, and how it becomes text around images."""

from dataclasses import dataclass

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import digest_of

IMAGE_SLOT = "<ImageHere>"


@dataclass(frozen=True)
class Template:
    """Text around images and question, by task.

    `prompts` holds `{images}` where the images go and `{question}` where the question goes; an answer follows the
    prompt and ends with the tokenizer's end-of-sequence token.
    """

    name: str
    version: int
    image: str
    """One image; holds IMAGE_SLOT, which becomes the image's visual tokens."""
    prompts: dict[Task, str]
    chat: bool = False
    """For models with a chat template of their own, which says where images go."""
    bos_tokens: int = 1
    """Beginning-of-sequence tokens before the prompt."""

    @property
    def digest(self) -> str:
        """Identity of the wording."""
        return digest_of([self.name, self.version, self.image, self.prompts])

    def words(self, task: Task, question: str) -> str:
        """The prompt without images: what a user says."""
        return self.prompts[task].replace("{images}", "").replace("{question}", question.strip()).strip()

    def segments(self, task: Task, question: str, image_count: int) -> list[str]:
        """The prompt cut at its images: text, IMAGE_SLOT, text, ...; joined again it is the prompt.

        A question is inserted after the cut, so that one that spells IMAGE_SLOT stays text.
        """
        before, after = self.prompts[task].split("{images}")
        pieces = [before]
        for _ in range(image_count):
            left, right = self.image.split(IMAGE_SLOT)
            pieces[-1] += left
            pieces += [IMAGE_SLOT, right]
        pieces[-1] += after.replace("{question}", question.strip())
        return pieces

    def answer(self, text: str) -> str:
        """The answer as it is learnt."""
        return text.strip()
