"""Small files in the shapes that data sets are published in, made by hand, and the records they mean."""

from __future__ import annotations

from typing import Any

from pyvdl.data import Question, Record

NEXT_COLUMNS = "video,frame_count,width,height,question,answer,qid,type"
MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {"category": 9, "url": "https://u", "video_id": "video0", "start time": 137.7, "end time": 149.4}
        | {"split": "train", "id": 0},
        {"category": 16, "url": "https://u", "video_id": "video6513", "start time": 0.0, "end time": 9.0}
        | {"split": "validate", "id": 6513},
    ],
    "sentences": [
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
        {"caption": "a cat, asleep ", "video_id": "video6513", "sen_id": 1},
        {"caption": "the car drives", "video_id": "video0", "sen_id": 2},
    ],
}
ONE_KA = 'key,vid_key,video_id,sentence\nret0,msr0,video0,"a person, at work"\nret1,msr6513,video6513,a dog runs\n'
VATEX = [
    {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A man climbs.", "He climbs. "], "chCap": ["一个人"]},
    {"videoID": "aaaaaaaaaaa_000000_000010", "enCap": ["A dog."]},
]
ANET = {
    "v_abc": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [60.81, 17.37], [80, 90]],
        "sentences": ["A woman walks.", " She stops.", "The end."],
    }
}
ACTOR = {
    "actor_name": "Boy one ",
    "keyframe_selection_indices": [0, 2],
    "recording_start_time_ms_since_epoch": 1646807046669,
    "caption": "A boy jumps.",
    "traces": [[{"x": 0.7, "y": 0.3, "time_ms_since_epoch": 1646807048278, "kf_idx": 0}]],
    "time_alignment": [
        {"referenced_word": "A", "start_ms": 2360, "end_ms": 2540},
        {"referenced_word": "boy", "start_ms": 2540, "end_ms": 2900},
    ],
}
VIDLN = {
    "vidln_id": 7,
    "dataset_id": "UVO_sparse_val",
    "video_id": "zxE180Fndow",
    "annotator_id": 103,
    "keyframe_names": ["0", "10", "20"],
    "actor_narratives": [
        ACTOR,
        {"actor_name": "background", "keyframe_selection_indices": [1], "caption": "In the background, a wall."},
    ],
}
INTERNVID = {
    "YoutubeID": "cccccccccc1",
    "Start_timestamp": "00:01:07.200",
    "End_timestamp": "01:00:10.500",
    "Caption": "a person is cooking",
    "Aesthetic_Score": 4.9,
    "UMT_Score": 0.41,
}
ANET_Q = [
    {"video_name": "abc", "question": "is it red", "question_id": "v_abc_1"},
    {"video_name": "xyz", "question": "what runs", "question_id": "v_xyz_1"},
    {"video_name": "abc", "question": "how many", "question_id": "v_abc_2"},
]
ANET_A = [
    {"answer": "yes", "type": 3, "question_id": "v_abc_1"},
    {"answer": "two", "type": 7, "question_id": "v_abc_2"},
    {"answer": "dog", "type": 5, "question_id": "v_xyz_1"},
]
MSRVTT_QA = [
    {"answer": "couch", "category_id": 14, "id": 0, "question": "what is shown?", "video_id": 7010},
    {"answer": "man", "category_id": 14, "id": 1, "question": "who talks?", "video_id": 7010},
]
NEXT_OE = (
    f"{NEXT_COLUMNS}\n"
    '11,42,640,360,"is it, old",no,4,DB\n'
    "22,9,640,360,why did he run,to win,0,CW\n"
    "11,42,640,360,what did it do after,ran,5,TN\n"
)
NEXT_MC = f"{NEXT_COLUMNS},a0,a1,a2,a3,a4\n11,42,320,240,where is it,2,8,DL,pool,mall,river,river,road\n"
KINETICS = (
    'label,youtube_id,time_start,time_end,split\n"petting cat",---QUuC4vJs,84,94,validate\nair drumming,b,0,10,train\n'
)
UCF = {
    "classInd.txt": "1 ApplyEyeMakeup\n37 HandstandPushups\n",
    "trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n",
    "testlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c02.avi\n",
}
WEBVID = (
    "videoid,contentUrl,duration,page_dir,name\n"
    '21179416,https://u/1.mp4,PT00H00M11S,006001_006050,"Aerial shot, winter forest"\n'
)


def question(text: str, answer: str, **more: Any) -> Question:
    return Question(question=text, answer=answer, **more)


# Each data set: its files, and the records they mean.
SHAPES: dict[str, tuple[dict[str, Any], list[Record]]] = {
    "smit": (
        {
            "train_set.txt": "flying/a_1\nflying/b_2\n",
            "transcriptions/flying/a_1.txt": "a plane takes off\nleft out\n",
            "transcriptions/flying/b_2.txt": " birds fly ",
        },
        [
            Record(key="flying/a_1", video="videos/flying/a_1.mp4", captions=("a plane takes off",), split="train"),
            Record(key="flying/b_2", video="videos/flying/b_2.mp4", captions=("birds fly",), split="train"),
        ],
    ),
    "vidln": (
        {"UVO_sparse_val.jsonl": [VIDLN]},
        [
            Record(
                key="UVO_sparse_val_7",
                video="videos/UVO_sparse_val/zxE180Fndow.mp4",
                narrative="<Boy one> A boy jumps. <background> In the background, a wall.",
                split="val",
                group="zxE180Fndow",
                extra={
                    "actors": [
                        {"name": "Boy one", "keyframes": ["0", "20"], "spoken_seconds": [2.36, 2.9]},
                        {"name": "background", "keyframes": ["10"]},
                    ]
                },
            )
        ],
    ),
    "videocc": (
        {
            "video_cc_public.csv": 'aaaaaaaaaa1,10000000,20500000,"a dog, wet"\n'
            "https://www.youtube.com/watch?v=aaaaaaaaaa1,10000000,20500000,another text\n"
        },
        [
            Record(
                key=f"aaaaaaaaaa1_10000000_20500000_{line}",
                video="videos/aaaaaaaaaa1.mp4",
                start_seconds=10.0,
                end_seconds=20.5,
                alt_text=text,
                group="aaaaaaaaaa1",
            )
            for line, text in ((1, "a dog, wet"), (2, "another text"))
        ],
    ),
    "internvid": (
        {"InternVid-10M-flt.jsonl": [INTERNVID]},
        [
            Record(
                key="cccccccccc1_00:01:07.200_01:00:10.500",
                video="videos/cccccccccc1.mp4",
                start_seconds=67.2,
                end_seconds=3610.5,
                captions=("a person is cooking",),
                group="cccccccccc1",
                extra={"UMT_Score": 0.41, "Aesthetic_Score": 4.9},
            )
        ],
    ),
    "webvid": (
        {"results_2M_val.csv": WEBVID},
        [
            Record(
                key="21179416",
                video="videos/006001_006050/21179416.mp4",
                alt_text="Aerial shot, winter forest",
                split="val",
            )
        ],
    ),
    "msrvtt": (
        {"train_val_videodatainfo.json": MSRVTT},
        [
            Record(
                key="video0", video="videos/video0.mp4", captions=("a car is shown", "the car drives"), split="train"
            ),
            Record(key="video6513", video="videos/video6513.mp4", captions=("a cat, asleep",), split="val"),
        ],
    ),
    "msrvtt-1ka": (
        {
            "MSRVTT_JSFUSION_test.csv": 'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a person, at work"\n',
            "MSRVTT_train.9k.csv": "video_id\nvideo0\n",
            "MSRVTT_data.json": MSRVTT,
        },
        [
            Record(key="video9770", video="videos/video9770.mp4", captions=("a person, at work",), split="test"),
            Record(
                key="video0", video="videos/video0.mp4", captions=("a car is shown", "the car drives"), split="train"
            ),
        ],
    ),
    "msrvtt-qa": (
        {"test_qa.json": MSRVTT_QA},
        [
            Record(
                key="video7010",
                video="videos/video7010.mp4",
                questions=(question("what is shown?", "couch", key="0"), question("who talks?", "man", key="1")),
                split="test",
            )
        ],
    ),
    "vatex": (
        {"vatex_validation_v1.0.json": VATEX},
        [
            Record(
                key="Ptf_2VRj-V0_000122_000132",
                video="videos/Ptf_2VRj-V0_000122_000132.mp4",
                captions=("A man climbs.", "He climbs."),
                split="val",
            ),
            Record(
                key="aaaaaaaaaaa_000000_000010",
                video="videos/aaaaaaaaaaa_000000_000010.mp4",
                captions=("A dog.",),
                split="val",
            ),
        ],
    ),
    "kinetics600": (
        {"train.csv": KINETICS},
        [
            Record(
                key="---QUuC4vJs_000084_000094",
                video="videos/---QUuC4vJs_000084_000094.mp4",
                label="petting cat",
                split="val",
                group="---QUuC4vJs",
            ),
            Record(
                key="b_000000_000010",
                video="videos/b_000000_000010.mp4",
                label="air drumming",
                split="train",
                group="b",
            ),
        ],
    ),
    "kinetics700": (
        {"test.csv": "youtube_id,time_start,time_end,split\nb,0,10,test\n"},
        [Record(key="b_000000_000010", video="videos/b_000000_000010.mp4", split="test", group="b")],
    ),
    "activitynet-captions": (
        {"val_2.json": ANET},
        [
            Record(
                key=f"v_abc_{i}",
                video="videos/v_abc.mp4",
                start_seconds=start,
                end_seconds=end,
                captions=(text,),
                split="val",
                group="v_abc",
            )
            for i, (start, end, text) in enumerate(
                ((0.83, 19.86, "A woman walks."), (17.37, 60.81, "She stops."), (80.0, 82.73, "The end."))
            )
        ],
    ),
    "activitynet-qa": (
        {"val_q.json": ANET_Q, "val_a.json": ANET_A},
        [
            Record(
                key="v_abc",
                video="videos/v_abc.mp4",
                questions=(
                    question("is it red", "yes", type="3", key="v_abc_1"),
                    question("how many", "two", type="7", key="v_abc_2"),
                ),
                split="val",
            ),
            Record(
                key="v_xyz",
                video="videos/v_xyz.mp4",
                questions=(question("what runs", "dog", type="5", key="v_xyz_1"),),
                split="val",
            ),
        ],
    ),
    "nextqa-oe": (
        {"test.csv": NEXT_OE, "add_reference_answer_test.json": {"11": {"4": "not at all", "5": "fled"}}},
        [
            Record(
                key="11",
                video="videos/11.mp4",
                questions=(
                    question("is it, old", "no", family="descriptive", type="DB", references=("not at all",), key="4"),
                    question(
                        "what did it do after", "ran", family="temporal", type="TN", references=("fled",), key="5"
                    ),
                ),
                split="test",
            ),
            Record(
                key="22",
                video="videos/22.mp4",
                questions=(question("why did he run", "to win", family="causal", type="CW", key="0"),),
                split="test",
            ),
        ],
    ),
    "nextqa-mc": (
        {"val.csv": NEXT_MC, "map_vid_vidorID.json": {"11": "1051/11", "22": "0008/22"}},
        [
            Record(
                key="11",
                video="videos/1051/11.mp4",
                questions=(
                    question(
                        "where is it",
                        "river",
                        family="descriptive",
                        type="DL",
                        options=("pool", "mall", "river", "river", "road"),
                        correct=2,
                        key="8",
                    ),
                ),
                split="val",
            )
        ],
    ),
    "ucf101": (
        UCF,
        [
            Record(
                key="v_ApplyEyeMakeup_g08_c01",
                video="videos/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
                label="Apply Eye Makeup",
                split="train",
                group="ApplyEyeMakeup_g08",
            ),
            Record(
                key="v_HandStandPushups_g01_c02",
                video="videos/HandstandPushups/v_HandStandPushups_g01_c02.avi",
                label="Hand Stand Pushups",
                split="test",
                group="HandstandPushups_g01",
            ),
        ],
    ),
}
