"""The reader of machine code sees what ptxas did wrong, and nothing where it did right."""

import pytest

from tests.machine_code import unwritten_uniform_registers

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
