"""The readers of what is compiled see what is wrong, and nothing where all is right."""

import pytest

from tests.machine_code import arrivals_before_all_have_met, unwritten_uniform_registers

# From a kernel whose first loop may run no step: its second one takes v's place from registers of the first.
LOST = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;                  /* 0x0000820000047ab9 */
        /*0010*/                   UMOV UR10, 0x400 ;                            /* 0x0000040000087882 */
        /*0020*/               @P0 BRA 0x70 ;                                    /* 0x0000000000000947 */
        /*0030*/                   ULEA UR7, UR4, UR10, 0xd ;                    /* 0x0000000a04077291 */
        /*0040*/                   UMOV UR8, URZ ;                               /* 0x0000003f00087c82 */
        /*0050*/                   LDG.E R2, desc[UR4][R2.64] ;                  /* 0x0000000402027981 */
        /*0060*/              @!P1 BRA 0x30 ;                                    /* 0x0000002000249947 */
        /*0070*/                   UIADD3 UR58, UP0, UR7, 0x40, URZ ;            /* 0x00000040073a7890 */
        /*0080*/                   UIADD3.X UR59, UR8, URZ, URZ, UP0, !UPT ;     /* 0x0000003f083b7890 */
        /*0090*/                   HGMMA.64x32x16.F32.BF16 R88, R128, gdesc[UR56].tnspB, R88 ; /* 0x4060003880587df0 */
        /*00a0*/                   EXIT ;                                        /* 0x000000000000794d */
"""  # noqa: E501


def test_a_register_that_only_one_way_writes_is_told_with_each_reader() -> None:
    assert unwritten_uniform_registers(LOST) == [
        "UIADD3 UR58, UP0, UR7, 0x40, URZ reads UR7",
        "UIADD3.X UR59, UR8, URZ, URZ, UP0, !UPT reads UR8",
    ]


@pytest.mark.parametrize(
    ("instruction", "harmless"),
    [
        ("@P0 BRA 0x70", "NOP"),  # The loop always runs.
        ("UIADD3 UR58, UP0, UR7, 0x40, URZ", "UIADD3.64 UR58, UR4, 0x40, URZ"),
        ("UIADD3 UR58, UP0, UR7, 0x40, URZ", "UIMAD.WIDE UR58, UR10, 0x4, UR4"),
        ("UIADD3 UR58, UP0, UR7, 0x40, URZ", "MOV R93, UR7"),  # Kept, and perhaps never used.
        ("UIADD3 UR58, UP0, UR7, 0x40, URZ", "UPRMT UR7, UR7, 0x3340, UR7"),  # Undefined for LLVM as well.
    ],
)
def test_what_every_way_writes_is_fine(instruction: str, harmless: str) -> None:
    told = unwritten_uniform_registers(LOST.replace(instruction, harmless))
    assert not any("UR7" in reader for reader in told)


def test_a_wide_number_is_two_registers_and_descriptors_are_four() -> None:
    narrow = LOST.replace("ULDC.64 UR4", "ULDC UR4").replace(
        "UIADD3 UR58, UP0, UR7", "UIADD3 UR58, UP0, UR10"
    )
    from_shared = narrow.replace("R88, R128, gdesc", "R88, gdesc").replace(
        "UIADD3.X UR59, UR8", "UIADD3.X UR59, UR10"
    )
    assert [reader.split()[-1] for reader in unwritten_uniform_registers(from_shared)] == [
        "UR5",
        "UR56",
        "UR57",
    ]


# A group that reads a tile, meets, and gives it back; then one that waits for copies of its own.
GIVES_BACK = """
$L__BB0_2:
	ld.shared.v4.f32 	{%f1, %f2, %f3, %f4}, [%r1];
	// begin inline asm
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2], %r3;
	// end inline asm
	bar.sync 	2, 128;
	add.f32 	%f5, %f1, %f2;
	@%p1 mbarrier.arrive.shared::cta.b64 _, [%r4];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd1 + 0 ], 0x10, %r6;
	cp.async.mbarrier.arrive.noinc.shared.b64 	[global_smem+2096];
"""


def test_an_arrival_behind_a_barrier_is_fine_and_so_is_that_of_every_thread() -> None:
    assert not arrivals_before_all_have_met(GIVES_BACK)


@pytest.mark.parametrize(
    ("instruction", "worse", "reason"),
    [
        ("bar.sync \t2, 128;", "", "ld.shared.v4.f32"),
        ("add.f32 \t%f5, %f1, %f2;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r7}, [%r1];", "ldmatrix"),
        ("add.f32 \t%f5, %f1, %f2;", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "wgmma"),
        # Who jumps there has perhaps met nobody.
        ("add.f32 \t%f5, %f1, %f2;", "$L__BB0_3:", "$L__BB0_3"),
    ],
)
def test_an_arrival_by_which_others_may_still_read_is_told(instruction: str, worse: str, reason: str) -> None:
    (told,) = arrivals_before_all_have_met(GIVES_BACK.replace(instruction, worse))
    assert told.startswith("@%p1 mbarrier.arrive")
    assert reason in told
