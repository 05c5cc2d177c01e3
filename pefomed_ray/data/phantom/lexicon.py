"""Words of radiology and of the questions asked about it, written by hand, for a tokenizer to be trained on."""

_ANATOMY = """
lung heart liver spleen kidney stomach bladder rectum brain brain stem cerebellum cerebrum spinal cord spine
vertebra trachea larynx pharynx esophagus bronchus pulmonary bronchus mandible tooth teeth parotid thyroid gland
tongue eye eyes ear nose skull scalp orbit sinus temporal lobe frontal lobe parietal lobe occipital lobe hemisphere
ventricle white matter gray matter cortex thalamus pituitary aorta artery vein vessel portal vein inferior vena cava
pulmonary artery coronary atrium left ventricle valve pericardium pleura diaphragm mediastinum hilum clavicle rib
sternum scapula humerus shoulder thorax chest wall breast gallbladder bile duct pancreas duodenum jejunum ileum
colon small bowel large bowel intestine appendix cecum mesentery peritoneum adrenal ureter urethra prostate uterus
ovary cervix testis pelvis pelvic cavity femur femoral head hip sacrum iliac bone pubis bone marrow muscle fat skin
soft tissue lymph node nerve joint cartilage ligament tendon disc neck head abdomen limb knee elbow wrist ankle hand
foot upper lobe middle lobe lower lobe left lung right lung left kidney right kidney lobe segment tissue organ
organs body cavity alveoli airway blood urine bile feces cerebrospinal fluid
"""
_DISEASE = """
abnormality lesion disease tumor mass nodule cancer carcinoma metastasis lymphoma glioma meningioma hemorrhage
infarct stroke edema brain edema brain tumor enhancing tumor non-enhancing tumor necrosis abscess cyst stone
calcification inflammation infection pneumonia tuberculosis bronchitis emphysema fibrosis effusion pleural effusion
pneumothorax atelectasis infiltration consolidation opacity cardiomegaly heart failure aneurysm stenosis thrombosis
embolism hypertension atherosclerosis hepatitis cirrhosis fatty liver liver cancer lung cancer kidney cyst
hydronephrosis splenomegaly obstruction perforation hernia ulcer polyp diverticulum colitis appendicitis
pancreatitis gallstone fracture dislocation osteoporosis arthritis scoliosis degeneration atrophy hydrocephalus
aneurysm malformation congenital benign malignant acute chronic mild moderate severe normal abnormal healthy
unhealthy enlarged thickened dilated collapsed displaced hyperdense hypodense isodense hyperintense hypointense
enhancing air fluid contrast shadow density signal intensity blunted clear
"""
_CARE = """
treatment therapy medication surgery surgical treatment medical treatment supportive treatment supportive therapy
radiotherapy chemotherapy targeted therapy immunotherapy intervention drainage puncture biopsy resection
transplantation dialysis rehabilitation physical therapy pharmacotherapy antibiotics oxygen dehydration observation
follow-up examination screening prevention vaccination quit smoking stop drinking keep warm prevent cold regular
examination healthy diet exercise enhance physical fitness avoid radiation avoid trauma avoid brain trauma control
blood pressure drink more water rest live healthy balanced diet weight control protect treat promptly early
detection symptom symptoms pain headache dizziness nausea vomiting fever cough expectoration sputum hemoptysis
bloody sputum dyspnea chest pain chest tightness palpitation arrhythmia fatigue weakness weight loss loss of
appetite jaundice ascites abdominal pain diarrhea constipation hematuria frequent urination back pain visual
impairment blurred vision tinnitus seizure coma paralysis numbness increased intracranial pressure cause causes
genetic factors environmental factors chemical factors radiation smoking alcohol air pollution bacterial infection
viral infection trauma aging obesity diabetes immune bronchial obstruction heart disease
"""
_FUNCTION = """
function effect role breathe breathing ventilation gas exchange gas delivery pronunciation swallow deliver food
promote blood flow pump blood circulation control heartbeat and breathing perceive things think memory control
movement receive sound see smell taste digest food digestion absorb nutrients absorb water secrete enzymes secrete
bile secrete hormones store urine produce urine discharge urine filter blood excrete body waste excrete feces store
feces discharge waste biotransformation detoxification detoxify metabolism immunity improve the body's immunity
produce blood cells store blood chewing cutting maintaining facial contour assisting pronunciation support the body
protect organs movement adjust water balance osmotic pressure balance respiratory system circulatory system
digestive system urinary system nervous system lymphatic system endocrine system skeletal system immune system
reproductive system hematopoiesis conduct nerve impulses maintain balance
"""
_IMAGING = """
image picture scan study view film radiograph x-ray ct mri mr t1 t2 flair weighted weighting modality computed
tomography magnetic resonance imaging ultrasound contrast-enhanced section slice plane transverse plane coronal
plane sagittal plane axial transverse coronal sagittal frontal lateral posteroanterior anteroposterior window
sequence marker portable scanning technique taken shown shows showing demonstrating revealing with without evidence
of unremarkable within limits size silhouette contour margin angle field volume level base apex damage none much a
little
"""
_WHERE = """
left right upper lower top bottom center middle central side both bilateral upper left upper right lower left lower
right leftmost rightmost topmost front back anterior posterior medial inner outer above below near beside between
inside outside around left lobe right lobe both lungs upper left lung upper right lung lower left lung lower right
lung upper left lobe upper right lobe lower left lobe lower right lobe corner edge location position located part
region area site symmetrical
"""
_LOOKS = """
color white black gray light gray dark gray dark bright shade shape circular round oval irregular u-shaped
triangular butterfly-shaped ring long flat smooth rough large small big bigger biggest smaller smallest largest size
tiny huge same equal almost the same wide narrow thick thin high low density zero one two three four five six seven
eight nine ten 0 1 2 3 4 5 6 7 8 9 10 number count many few single multiple several pair
"""
_ASKING = """
what which where how why who when is are was were does do can could will would has have had be been yes no not there
this that these those it they patient person human man woman doctor the a an of in on at to from for by via or and
any some all every each only most more less than other another same different kind kinds type belong belongs contain
contains include included exist existing appear appears look looks see seen observe observed visible find found show
bring occur occurrence prevent avoid treat use used using be called name list describe give tell count compare
choose main severe imaged pictured represent healthy left or right part of yes or no
"""


def _entries(*texts: str) -> tuple[str, ...]:
    """Single words of all texts, then the phrases that must be seen whole, each once and in order."""
    words = (word for text in texts for word in text.split())
    return tuple(dict.fromkeys([*words, *_PHRASES]))


_PHRASES: tuple[str, ...] = (
    "spinal cord",
    "brain stem",
    "small bowel",
    "large bowel",
    "femoral head",
    "pelvic cavity",
    "temporal lobe",
    "left lung",
    "right lung",
    "left kidney",
    "right kidney",
    "upper left lung",
    "upper right lung",
    "lower left lung",
    "lower right lung",
    "upper left lobe",
    "upper right lobe",
    "lower left lobe",
    "lower right lobe",
    "both lungs",
    "transverse plane",
    "coronal plane",
    "sagittal plane",
    "brain edema",
    "brain tumor",
    "brain enhancing tumor",
    "brain non-enhancing tumor",
    "lung cancer",
    "liver cancer",
    "liver nodule",
    "kidney cyst",
    "pleural effusion",
    "pulmonary nodule",
    "pulmonary mass",
    "medical treatment, surgical treatment",
    "medical therapy, supportive therapy",
    "improve the body's immunity",
    "absorb nutrients",
    "filter blood",
    "store urine",
    "digest food",
    "secrete enzymes",
    "excrete feces",
    "promote blood flow",
    "control heartbeat and breathing",
    "gas delivery",
    "chest tightness",
    "chest pain",
    "visual impairment",
    "increased intracranial pressure",
    "quit smoking",
    "enhance physical fitness",
    "respiratory system",
    "digestive system",
    "urinary system",
    "nervous system",
    "circulatory system",
    "there is no abnormality",
    "the heart size is normal",
    "the lungs are clear",
    "how many",
    "which side",
    "light gray",
    "dark gray",
    "t1 weighted",
    "t2 weighted",
    "in this image",
    "in the picture",
    "does the picture contain",
)

LEXICON: tuple[str, ...] = _entries(_ANATOMY, _DISEASE, _CARE, _FUNCTION, _IMAGING, _WHERE, _LOOKS, _ASKING)
