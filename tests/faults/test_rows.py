"""The tests of each fault that a run survives or refuses. docs/resuming.md says for each row what
happens, and which result its tests check.
"""

import ast
import re
from pathlib import Path

CLUSTER, RECOVERY, CHECKPOINT = (
    "faults/test_in_a_cluster.py",
    "launch/test_recovery.py",
    "train/checkpoint/test_checkpoints.py",
)
BITS = f"{CLUSTER}::test_the_parameters_are_the_same_to_the_bit"
"""of one run that meets what the other tests of that file look at"""
HUNTED = f"{RECOVERY}::test_killed_in_every_way_it_ends_with_the_same_bits"
WRITE, ELASTIC = "faults/test_checkpoint_write.py", "faults/test_elastic.py"
SIGNALS = (
    "faults/test_signals.py::test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits"
)
OWNER, ELSEWHERE = "train/checkpoint/test_owner.py", "launch/test_checkpoints_elsewhere.py"
SECURITY, DATA, HOSTS = (
    "faults/test_security.py",
    "faults/test_damaged_data.py",
    "faults/test_two_hosts.py",
)
DRIVE, HEARD, AWAY = (
    "launch/test_driver.py",
    "launch/test_signals.py",
    "train/guards/test_storage.py",
)

ROWS: dict[str, tuple[str, ...]] = {
    "SIGKILL of rank 0, of rank 1, in mid-step": (
        BITS,
        f"{CLUSTER}::test_a_worker_that_is_killed_in_the_middle_of_a_step",
        HUNTED,
        *("launch/test_ray_cluster.py::test_who_has_lost_another_one_is_not_the_cause",),
        *("launch/test_ray_trainer.py::test_what_ended_the_workers_is_noted_for_the_journal",),
        *(
            "train/test_writer_lock.py::test_what_ended_other_workers_is_told_once_by_the_next_attempt",
        ),
    ),
    "exception in the loader": (
        *(BITS, f"{CLUSTER}::test_an_exception_in_the_loader_of_one_worker_starts_all_again"),
        *(
            "data/ffcv/test_reader.py::test_an_error_in_the_thread_arrives",
            "data/ffcv/test_reader.py::test_a_thread_that_dies_is_noticed",
        ),
    ),
    "hang in the loader": (
        *(
            BITS,
            f"{CLUSTER}::test_a_loader_that_hangs_is_written_down_and_its_worker_started_again",
        ),
        *(
            "data/ffcv/test_reader.py::test_a_hang_arrives_at_the_limit",
            "train/guards/test_watchdog.py::test_a_hang_is_written_down_and_ended",
        ),
        *(
            f"{DRIVE}::test_workers_that_have_hung_are_named_with_their_stacks_in_the_place_of_a_lost_connection",
        ),
    ),
    "kill during a checkpoint write": (
        *(f"{WRITE}::test_killed_while_a_checkpoint_is_written", HUNTED),
        *(
            f"{WRITE}::test_killed_while_a_checkpoint_goes_to_s3_and_gone_on_with_in_a_fresh_folder",
        ),
        *(f"{CHECKPOINT}::test_a_write_that_was_cut_short_is_no_checkpoint",),
    ),
    "kill while a step is saved again": (
        *(f"{CHECKPOINT}::test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new",),
        *(
            "train/checkpoint/test_store.py::test_a_step_that_is_saved_again_leaves_the_old_or_the_new_wherever_it_is_cut",
        ),
    ),
    "disk full": (
        f"{WRITE}::test_a_full_disk_is_said_in_a_line_and_with_room_the_run_goes_on",
        *(f"{WRITE}::test_a_full_disk_that_holds_the_whole_run_costs_no_bit",),
        *(f"{WRITE}::test_workers_that_a_full_disk_ends_are_not_started_again",),
        *("launch/test_ray_trainer.py::test_what_the_user_alone_can_change_is_not_met_again",),
        *(
            "train/test_writer_lock.py::test_an_error_that_a_full_disk_keeps_from_the_journal_is_raised_all_the_same",
        ),
    ),
    "storage that fails for a moment": (
        f"{WRITE}::test_going_back_passes_by_a_checkpoint_that_storage_failed_to_take",
        f"{WRITE}::test_storage_that_fails_for_a_moment_costs_one_checkpoint_and_no_training",
        f"{WRITE}::test_storage_that_fails_for_a_moment_at_the_last_checkpoint_gets_it_once_more",
        *(
            "train/checkpoint/test_background.py::test_that_one_rank_cannot_write_is_known_at_once_and_all_write_again",
        ),
        *(f"{CHECKPOINT}::test_a_score_that_cannot_be_read_now_costs_nobody_the_best",),
        *("train/checkpoint/test_store.py::test_a_request_that_failed_deletes_nothing",),
    ),
    "storage that is away while a run starts": (
        f"{WRITE}::test_storage_that_is_away_as_a_run_starts_is_waited_for_by_the_same_attempt",
        *(
            f"{AWAY}::test_it_is_tried_again_and_told_once",
            f"{AWAY}::test_of_two_ranks_one_tries_and_both_live",
        ),
        *("train/test_writer_lock.py::test_storage_that_is_away_is_looked_for_again",),
        *("launch/test_ray_trainer.py::test_storage_that_is_away_as_a_worker_dies_ends_nothing",),
        *("launch/test_resizing.py::test_storage_that_is_away_as_a_run_grows_ends_nothing",),
        *(f"{WRITE}::test_what_a_run_has_written_down_is_waited_for",),
    ),
    "kill while an old checkpoint is deleted": (
        f"{CHECKPOINT}::test_a_kill_while_an_old_checkpoint_is_deleted_is_survived",
    ),
    "an old checkpoint that cannot be deleted": (
        "train/checkpoint/test_background.py::test_an_old_one_that_cannot_be_deleted_is_told_and_costs_no_new_one",
        *(
            "train/checkpoint/test_store.py::test_a_bucket_that_lets_nobody_delete_takes_new_ones_all_the_same",
        ),
    ),
    "truncated, bit-flipped, missing checkpoint; missing manifest": (
        *(
            HUNTED,
            f"{WRITE}::test_the_newest_is_damaged",
            f"{WRITE}::test_all_are_damaged_and_the_run_begins_anew",
        ),
        *(
            f"{CHECKPOINT}::test_a_damaged_checkpoint_is_quarantined_by_name_and_the_one_before_is_used",
        ),
    ),
    "checkpoint on a bad sector": (
        f"{CHECKPOINT}::test_one_whose_medium_fails_is_quarantined_and_the_one_before_is_used",
    ),
    "truncated Ray snapshot": (HUNTED,),
    "driver killed": (
        *(
            BITS,
            f"{CLUSTER}::test_a_driver_that_is_killed_takes_its_workers_along_and_the_run_is_resumed",
        ),
        *(
            HUNTED,
            "launch/test_continual_recovery.py::test_a_run_killed_in_its_second_task_goes_on_there",
        ),
    ),
    "the driver's machine dies, and another one resumes": (
        "launch/test_driver_lock.py::test_the_lock_of_a_machine_that_may_be_dead_is_waited_for",
    ),
    "SIGTERM": (
        SIGNALS,
        *("faults/test_preemption.py::test_a_stop_waits_for_no_evaluation_which_is_made_up_for",),
        *(
            "faults/test_two_drivers.py::test_the_second_is_refused_in_one_line_and_the_first_goes_on",
        ),
        *(f"{HEARD}::test_the_first_asks_to_save_and_the_second_ends_at_once",),
        *(f"{DRIVE}::test_whoever_asks_to_stop_is_heard_and_told_so_on_storage_that_is_away",),
        *(f"{HEARD}::test_the_two_signals_of_one_wish_to_stop_a_suite_are_one",),
    ),
    "Ctrl-C": (
        SIGNALS,
        HUNTED,
        f"{HEARD}::test_the_first_asks_to_save_and_the_second_ends_at_once",
    ),
    "a terminal that is lost": (
        *(SIGNALS, "faults/test_signals.py::test_a_lost_terminal_saves_and_stops"),
        *(f"{HEARD}::test_the_signals_of_schedulers_and_lost_terminals_never_mean_at_once",),
        *(f"{HEARD}::test_a_lost_terminal_that_was_ignored_before_stays_so",),
    ),
    "a log, a pipe, a terminal that takes no more; a journal that cannot be read for a moment": (
        *(
            f"{DRIVE}::test_a_terminal_that_takes_no_more_costs_nothing_but_what_it_would_have_shown",
        ),
        *(f"{DRIVE}::test_on_a_full_disk_the_exit_status_stays",),
        *(f"{DRIVE}::test_a_journal_that_cannot_be_read_for_a_moment_is_read_again",),
    ),
    "a link between hosts that is cut and mended": (
        f"{HOSTS}::test_a_link_that_was_cut_and_mended_costs_no_bit",
    ),
    "weights of workers that come apart": (
        *(BITS, f"{CLUSTER}::test_weights_that_come_apart_are_found_and_given_up"),
        *(
            "train/guards/test_replica_check.py::test_weights_that_come_apart_again_and_again_are_no_matter_of_the_learning_rate",
        ),
    ),
    "MLflow slow, down and back": (
        *(
            "faults/test_mlflow.py::test_a_server_that_hangs_and_dies_costs_no_bit_and_misses_nothing",
        ),
        *("track/test_mlflow.py::test_a_server_that_hangs_dies_and_comes_back",),
        *("track/test_mlflow.py::test_a_server_that_hangs_does_not_hold_the_driver",),
        *("track/test_mlflow.py::test_a_server_that_refuses_costs_the_run_nothing",),
    ),
    "stale JIT lock": ("faults/test_stale_lock.py::test_training_waits_for_no_build",),
    "clock set back": ("faults/test_clock.py::test_set_back_in_the_middle_and_before_a_resume",),
    "NaN at step k": (
        *(BITS, f"{CLUSTER}::test_what_is_not_finite_on_one_worker_is_skipped_by_all"),
        *(
            "faults/test_not_finite.py::test_one_is_skipped_and_the_rest_is_as_if_it_had_been_told_so",
        ),
        *(
            "faults/test_not_finite.py::test_several_in_a_row_lead_back_to_the_checkpoint_and_around_them",
        ),
        *(
            "faults/test_not_finite.py::test_where_zero_holds_the_gradients_it_is_seen_all_the_same",
        ),
    ),
    "a folder that is lost, its checkpoints elsewhere": (
        *(f"{ELSEWHERE}::test_they_are_there_and_a_run_whose_folder_is_lost_goes_on_with_them",),
        *(f"{ELSEWHERE}::test_what_a_run_has_decided_outlives_its_folder",),
    ),
    "loss spike": ("faults/test_spike.py::test_it_is_passed_over_or_gone_back_for",),
    "node killed and added, 2 -> 1 -> 2 and 3 -> 2": (
        *(f"{ELASTIC}::test_a_node_dies", f"{ELASTIC}::test_a_node_dies_and_another_comes"),
        *(
            f"{ELASTIC}::test_one_of_three_nodes_dies",
            "train/test_elastic.py::test_each_sample_is_seen_once_an_epoch_over_any_sequence_of_sizes",
        ),
    ),
    "a stop while a node is waited for": (
        f"{ELASTIC}::test_whoever_stops_a_run_that_waits_for_a_node_is_told_so",
    ),
    "a node is taken away after a notice": (
        *(f"{ELASTIC}::test_a_node_is_taken_away_after_a_notice",),
        *("faults/test_preemption.py::test_a_notice_is_saved_upon_once_and_the_run_goes_on",),
        *("faults/test_preemption.py::test_a_notice_is_saved_upon_once_more_before_its_deadline",),
        *(
            "faults/test_preemption.py::test_two_ranks_save_in_an_evaluation_upon_what_one_of_them_has_heard",
        ),
        *("faults/test_preemption.py::test_a_save_waits_for_no_evaluation_which_is_begun_anew",),
    ),
    "a worker that dies in an evaluation": (
        "faults/test_preemption.py::test_what_dies_in_an_evaluation_has_saved_before_it",
    ),
    "out of memory": (
        *("faults/test_out_of_memory.py::test_memory_that_runs_out_in_mid_run_costs_no_sample",),
        *(
            "faults/test_out_of_memory.py::test_memory_that_runs_out_on_one_of_two_ranks_in_mid_run_costs_no_sample",
        ),
        *("faults/test_out_of_memory.py::test_the_micro_batch_is_halved_until_it_fits",),
        *("faults/test_out_of_memory.py::test_what_was_trained_before_memory_ran_out_is_told",),
        *(
            "faults/test_out_of_memory.py::test_where_no_fewer_can_be_taken_it_says_why_and_notes_nothing",
        ),
        *(
            "faults/test_out_of_memory.py::test_a_worker_that_dies_of_it_is_spoken_for_by_the_next_attempt",
        ),
    ),
    "credentials that are not at hand, a bucket that lets nobody write": (
        *(f"{ELSEWHERE}::test_a_run_whose_credentials_are_not_at_hand_asks_for_them_at_once",),
        *("train/checkpoint/test_store.py::test_a_bucket_that_lets_nobody_write_ends_the_run",),
    ),
    "no checkpoint where the journal knows one": (
        f"{WRITE}::test_where_they_were_is_empty_and_nothing_is_trained_before_they_are_back",
    ),
    "damaged and truncated .beton": (
        f"{DATA}::test_a_damaged_page_stops_the_run_in_one_line_and_restored_it_goes_on",
        f"{DATA}::test_a_page_that_one_of_two_workers_meets_ends_the_run_in_one_line",
        f"{DATA}::test_damage_in_the_middle_is_refused_and_restored_the_run_goes_on_at_the_newest_checkpoint",
        f"{DATA}::test_the_page_of_an_image_that_cannot_be_decoded_is_compared_and_named",
        f"{DATA}::test_each_evaluation_compares_other_pages",
        f"{DATA}::test_verify_names_the_page",
        f"{DATA}::test_storage_that_is_away_damages_nothing",
        f"{DATA}::test_a_truncated_file_is_refused_in_one_line",
        f"{DATA}::test_a_file_that_is_cut_short_while_it_is_read_is_refused",
        "test_cli.py::test_a_flipped_byte_in_the_data_is_refused_by_verify_and_by_launch",
        "test_bad_use.py::test_an_event_file_that_is_cut_short_is_refused_by_verify_and_by_launch",
        "data/ffcv/test_reader.py::test_a_corrupt_jpeg_is_named",
    ),
    "recipe changed before resume": (
        *("faults/test_changed_recipe.py::test_the_fields_that_differ_are_named",),
        *(
            "faults/test_changed_recipe.py::test_a_run_without_a_checkpoint_begins_as_it_was_launched_or_not_at_all",
        ),
        *("launch/test_resume.py::test_another_recipe_is_refused_with_the_fields_that_differ",),
    ),
    "two drivers resume one run": (
        *(
            "faults/test_two_drivers.py::test_the_second_is_refused_in_one_line_and_the_first_goes_on",
        ),
        *("launch/test_driver_lock.py::test_on_this_machine_it_is_refused_at_once",),
        *("launch/test_driver_lock.py::test_one_that_lives_elsewhere_is_named_in_the_end",),
    ),
    "two drivers know one place of checkpoints": (
        *(f"{OWNER}::test_the_earlier_of_two_drivers_stops_at_its_save_and_tells_nothing_whole",),
        *(f"{ELSEWHERE}::test_a_driver_whose_place_another_has_taken_over_ends_at_its_next_save",),
        *(f"{ELSEWHERE}::test_a_place_whose_run_has_not_saved_yet_is_that_runs_all_the_same",),
    ),
    "an abandoned attempt that still uploads": (
        f"{OWNER}::test_what_an_abandoned_attempt_still_uploads_reaches_no_checkpoint_of_another",
    ),
    "a file of a checkpoint gone between its verification and its loading": (
        "train/checkpoint/test_fetched.py::test_a_file_that_is_gone_since_it_was_verified_is_an_error_and_nothing_is_loaded",
        *(
            "train/checkpoint/test_fetched.py::test_no_other_process_takes_away_what_one_has_fetched_and_what_a_dead_one_left_is_swept",
        ),
    ),
    "malicious pickle": (
        *(
            f"{SECURITY}::test_a_pickle_in_a_checkpoint_is_not_run",
            f"{SECURITY}::test_nor_by_deepspeed",
        ),
        *(f"{SECURITY}::test_weights_that_are_a_pickle_are_refused",),
        *(f"{SECURITY}::test_a_pickle_that_a_recipe_has_read_is_not_run",),
    ),
    "../ in a name, a path, a saved recipe": (
        *(
            f"{SECURITY}::test_a_name_stays_in_the_folder_of_runs",
            f"{SECURITY}::test_a_saved_recipe_names_no_code_but_ours",
        ),
        *("report/test_store.py::test_known_artifacts_alone_and_none_through_a_link",),
        *("recipe/test_suite.py::test_a_damaged_or_foreign_suite_json_is_refused_in_one_line",),
        *(f"{SECURITY}::test_a_run_from_elsewhere_names_no_folder_elsewhere",),
    ),
    "a folder that leads to another's cluster": (
        f"{SECURITY}::test_a_run_from_elsewhere_leads_to_no_cluster",
    ),
    "a folder that leads to another's checkpoints": (
        f"{ELSEWHERE}::test_a_run_whose_folder_names_anothers_place_is_not_gone_on_with_and_nothing_is_touched",
    ),
    "a client without the cluster's token": (
        *(
            f"{HOSTS}::test_a_client_without_the_token_is_told_so",
            f"{HOSTS}::test_a_client_that_has_lost_its_token_is_told_so",
        ),
        *("launch/test_cluster.py::test_a_token_that_is_not_at_hand_is_said_in_one_line",),
    ),
    "a stranger on the network": (
        f"{CLUSTER}::test_a_cluster_of_our_own_listens_to_its_own_machine_alone",
    ),
    "a planted secret": (
        *(
            f"{SECURITY}::test_a_run_and_its_store_hold_no_secret",
            f"{SECURITY}::test_the_password_of_a_server_is_not_told",
        ),
        *(f"{CLUSTER}::test_no_secret_of_the_driver_is_written_down_by_anybody",),
    ),
}
TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs/resuming.md"


def test_the_page_has_each_fault_with_its_result() -> None:
    _, _, chapter = PAGE.read_text().partition("## Faults that the tests inject")
    results, faults = (
        [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in table.splitlines()[2:]]
        for table in re.findall(r"(?:^\|.*\n)+", chapter.partition("\n## ")[0], flags=re.MULTILINE)
    )
    assert [fault for fault, _, _ in faults] == list(ROWS)
    assert {result for _, _, result in faults} == {result for result, _ in results}


def test_every_test_of_the_table_is_there() -> None:
    missing = [
        test for tests in ROWS.values() for test in tests if not _is_there(*test.split("::"))
    ]
    assert missing == []


def test_every_file_of_faults_is_in_the_table() -> None:
    named = {test.split("::")[0] for tests in ROWS.values() for test in tests}
    files = {f"faults/{file.name}" for file in (TESTS / "faults").glob("test_*.py")} - {
        f"faults/{Path(__file__).name}"
    }
    assert len(files) >= 8 and files <= named


def _is_there(file: str, name: str) -> bool:
    """Under its name, and nothing skips it: no mark of its own or of its file, and no call in the
    file.
    """
    if not (TESTS / file).is_file():
        return False
    tree = ast.parse((TESTS / file).read_text())
    functions = [
        each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name
    ]
    marks: list[ast.AST] = [mark for each in functions for mark in each.decorator_list]
    marks += [
        each
        for each in tree.body
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"
    ]
    is_skipped = any(
        "mark.skip" in ast.unparse(mark) or "mark.xfail" in ast.unparse(mark) for mark in marks
    )
    calls = {ast.unparse(each.func) for each in ast.walk(tree) if isinstance(each, ast.Call)}
    return (
        len(functions) == 1
        and not is_skipped
        and not calls & {"pytest.skip", "pytest.importorskip", "pytest.xfail"}
    )
