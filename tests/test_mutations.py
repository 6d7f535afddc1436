"""The list of mutations keeps up with the code that it breaks."""

from conftest import ROOT

from tools.mutations import MUTATIONS


def test_every_mutation_still_changes_a_line_and_names_tests_that_are_there():
    for mutation in MUTATIONS:
        assert mutation.old in (ROOT / mutation.file).read_text(), mutation.name
        assert mutation.new != mutation.old, mutation.name
        for name in mutation.tests.split():
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), mutation.name
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
