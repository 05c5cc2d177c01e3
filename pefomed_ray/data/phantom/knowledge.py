"""General medical knowledge in a few words: what organs do, and how diseases arise, show, are treated and prevented."""

# The words are ours; the manner (a short list) is the one in which medical question sets answer.
FUNCTIONS: dict[str, str] = {
    "Lung": "Breathe",
    "Heart": "Promote blood flow",
    "Brain": "Perceive things, control the body",
    "Liver": "Biotransformation, detoxification",
    "Spleen": "Improve the body's immunity",
    "Kidney": "Filter blood, produce urine",
    "Bladder": "Store urine",
    "Rectum": "Store feces, excrete feces",
    "Small Bowel": "Absorb nutrients, digest food",
    "Stomach": "Digest food, secrete enzymes",
    "Colon": "Absorb water, excrete body waste",
    "Trachea": "Gas delivery",
    "Larynx": "Ventilation, pronunciation",
    "Mandible": "Chewing, maintaining facial contour",
    "Eye": "See things",
}
# Verb phrases for yes/no questions: (infinitive, -ing form, organs that do it).
ABILITIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("store urine", "storing urine", ("Bladder",)),
    ("excrete feces", "excreting feces", ("Rectum",)),
    ("absorb nutrients", "absorbing nutrients", ("Small Bowel",)),
    ("secrete bile", "secreting bile", ("Liver",)),
    ("promote blood flow", "promoting blood flow", ("Heart",)),
    ("breathe", "breathing", ("Lung",)),
    ("perceive things", "perceiving things", ("Brain",)),
    ("produce urine", "producing urine", ("Kidney",)),
    ("improve the body's immunity", "improving the body's immunity", ("Spleen",)),
    ("detoxify the blood", "detoxifying the blood", ("Liver",)),
)
SYSTEMS: dict[str, tuple[str, ...]] = {
    "respiratory": ("Lung", "Trachea", "Larynx"),
    "circulatory": ("Heart",),
    "urinary": ("Kidney", "Bladder"),
    "digestive": ("Liver", "Stomach", "Small Bowel", "Colon", "Rectum", "Tooth"),
    "lymphatic": ("Spleen",),
    "nervous": ("Brain", "Spinal Cord"),
}
TREATMENT: dict[str, str] = {
    "Cardiomegaly": "Medication, physical therapy",
    "Mass": "Surgical treatment, medical treatment",
    "Nodule": "Observation, surgical treatment",
    "Pneumonia": "Medical therapy, supportive therapy",
    "Effusion": "Drainage, medical treatment",
    "Pneumothorax": "Oxygen, closed drainage",
    "Atelectasis": "Physical therapy, bronchoscopy",
    "Lung Cancer": "Surgical treatment, chemotherapy",
    "Liver Cancer": "Surgical treatment, intervention",
    "Liver Nodule": "Observation, medical treatment",
    "Kidney Cyst": "Observation, puncture",
    "Brain Edema": "Dehydration, supportive treatment",
    "Brain Tumor": "Surgical treatment, radiotherapy",
}
SYMPTOM: dict[str, str] = {
    "Cardiomegaly": "Chest tightness, arrhythmia",
    "Mass": "Cough, chest pain",
    "Nodule": "Usually none",
    "Pneumonia": "Fever, cough, expectoration",
    "Effusion": "Chest tightness, fatigue",
    "Pneumothorax": "Sudden chest pain, dyspnea",
    "Atelectasis": "Dyspnea, cough",
    "Lung Cancer": "Cough, bloody sputum",
    "Liver Cancer": "Pain in the liver area, weight loss",
    "Liver Nodule": "Usually none",
    "Kidney Cyst": "Back pain",
    "Brain Edema": "Headache, vomiting",
    "Brain Tumor": "Headache, visual impairment",
}
CAUSE: dict[str, str] = {
    "Cardiomegaly": "Hypertension, heart disease",
    "Mass": "Inflammation, tumor",
    "Nodule": "Infection, smoking",
    "Pneumonia": "Bacterial infection",
    "Effusion": "Heart failure, infection",
    "Pneumothorax": "Trauma, ruptured alveoli",
    "Atelectasis": "Bronchial obstruction",
    "Lung Cancer": "Smoking, air pollution",
    "Liver Cancer": "Hepatitis, alcohol",
    "Liver Nodule": "Cirrhosis, hepatitis",
    "Kidney Cyst": "Aging, congenital factors",
    "Brain Edema": "Trauma, tumor",
    "Brain Tumor": "Genetic factors, radiation",
}
PREVENTION: dict[str, str] = {
    "Cardiomegaly": "Control blood pressure, exercise",
    "Mass": "Quit smoking, regular examination",
    "Nodule": "Quit smoking, enhance physical fitness",
    "Pneumonia": "Keep warm, prevent cold",
    "Effusion": "Treat the primary disease",
    "Pneumothorax": "Avoid strenuous exercise",
    "Atelectasis": "Breathing exercise, quit smoking",
    "Lung Cancer": "Quit smoking, avoid pollution",
    "Liver Cancer": "Vaccination, stop drinking",
    "Liver Nodule": "Stop drinking, regular examination",
    "Kidney Cyst": "Drink more water, regular examination",
    "Brain Edema": "Avoid brain trauma, rest",
    "Brain Tumor": "Healthy diet, avoid radiation",
}


def family(disease: str) -> str:
    """The disease as the knowledge tables name it: every kind of brain tumour is one."""
    return "Brain Tumor" if disease.endswith("Tumor") else disease
