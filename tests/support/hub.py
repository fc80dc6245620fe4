"""A Hugging Face hub in memory, in place of the requests with which huggingface_hub uploads a folder."""

from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl, constants


class Hub:
    """Repositories in memory."""

    url = "http://hub.test"

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}  # the files of each, by path
        self.private: set[str] = set()
        self.refused = ""  # a repository to which nothing can be committed
        self.requests: list[str] = []

    def connect(self, monkeypatch):
        """Make this the hub of this process, with a token; without hf_xet, which uploads past `create_commit`."""
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda **options: _Api(self, **options))


class _Api(HfApi):
    """huggingface_hub's own choice of files, with a hub in memory."""

    def __init__(self, hub, **options):
        super().__init__(**options)
        self.hub = hub

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.hub.requests.append(f"create {repo_id}")
        if repo_id not in self.hub.repositories and private:
            self.hub.private.add(repo_id)
        self.hub.repositories.setdefault(repo_id, {})
        return RepoUrl(f"{self.hub.url}/{repo_id}", endpoint=self.hub.url)

    def repo_exists(self, repo_id):
        self.hub.requests.append(f"exists {repo_id}")
        return repo_id in self.hub.repositories

    def repo_info(self, repo_id):
        return SimpleNamespace(private=repo_id in self.hub.private)

    def _validate_yaml(self, content, **_):
        """Do not ask for the opinion of the real hub on a card."""

    def list_repo_files(self, repo_id, **_):
        return list(self.hub.repositories[repo_id])

    def create_commit(self, repo_id, operations, **_):
        if repo_id == self.hub.refused:
            raise PermissionError("You have no permission to write.")
        files = self.hub.repositories[repo_id]
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            else:
                del files[operation.path_in_repo]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.connect(monkeypatch)
    return hub
