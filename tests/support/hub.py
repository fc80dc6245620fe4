"""A Hugging Face hub in memory, in place of the requests with which huggingface_hub uploads a folder."""

from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl, constants


class Hub(HfApi):
    """huggingface_hub's own choice of files, with repositories in memory."""

    url = "http://hub.test"

    def __init__(self):
        super().__init__()
        self.repositories = {}
        self.private = set()  # the files of each, by path; the names of private ones
        self.refused = ""  # a repository to which nothing can be committed
        self.requests = []

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.requests.append(f"create {repo_id}")
        if repo_id not in self.repositories and private:
            self.private.add(repo_id)
        self.repositories.setdefault(repo_id, {})
        return RepoUrl(f"{self.url}/{repo_id}", endpoint=self.url)

    def repo_exists(self, repo_id):
        self.requests.append(f"exists {repo_id}")
        return repo_id in self.repositories

    def repo_info(self, repo_id):
        return SimpleNamespace(private=repo_id in self.private)

    def _validate_yaml(self, content, **_):
        """Do not ask for the opinion of the real hub on a card."""

    def list_repo_files(self, repo_id, **_):
        return list(self.repositories[repo_id])

    def create_commit(self, repo_id, operations, **_):
        if repo_id == self.refused:
            raise PermissionError("You have no permission to write.")
        files = self.repositories[repo_id]
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            else:
                del files[operation.path_in_repo]


@pytest.fixture
def hub(monkeypatch):
    """The hub of this process, with a token; without hf_xet, which uploads past `create_commit`."""
    hub = Hub()
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: hub)
    return hub
